import Config

# A DPMetadata lives in one Python worker: calls on it must reach that worker, also while it is busy.
SnakeBridge.ConfigHelper.configure_snakepit!(affinity: :strict_queue)
