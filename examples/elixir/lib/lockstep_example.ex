defmodule LockstepExample do
  @moduledoc """
  Four data-parallel ranks go through one step in chunks of at most 64 rows.

  Run it with `./run.sh` here, or with `make elixir` at the top of the repository.
  """

  require SnakeBridge

  # Two lines: SnakeBridge takes `alias Lockstep.{...}` for a call of a Python function.
  alias Lockstep.DPMetadata
  alias Lockstep.ParallelConfig

  @counts [120, 80, 140, 100]
  @max_chunk_size 64

  def run do
    SnakeBridge.run_as_script(fn ->
      first_steps()
      # As lists: [64, 64, 64, 64] is also the charlist ~c"@@@@".
      IO.inspect(chunk_loop(2), label: "chunks, as rank 2 sees them", charlists: :as_lists)
      failing_block()
      refused_calls()
    end)
  end

  defp first_steps do
    # The constructor takes the maximum and the counts; the third argument holds optional positional ones.
    {:ok, metadata} = DPMetadata.new(Enum.max(@counts), @counts, [])

    # With a sequence-parallel size of 1 the sizes are the counts, as a list of integers.
    {:ok, whole_step} = DPMetadata.sp_local_sizes(metadata, 1)

    counts =
      SnakeBridge.with_python whole_step do
        context
      end

    IO.inspect({counts, Enum.max(counts)}, label: "counts and maximum")
    IO.inspect(Enum.scan(counts, &+/2), label: "cumulative")
    counts
  end

  defp chunk_loop(rank) do
    metadata = metadata(rank)
    # As many chunks as the longest rank needs, known to every rank beforehand.
    last = div(Enum.max(@counts) + @max_chunk_size - 1, @max_chunk_size) - 1

    for chunk_idx <- 0..last//1 do
      {:ok, chunk} = DPMetadata.chunked_sizes(metadata, 1, @max_chunk_size, chunk_idx)

      SnakeBridge.with_python chunk do
        # `context` is what entering gave. A layer would exchange its rows here.
        {:ok, ^context} = DPMetadata.get_chunk_sizes_across_dp_rank(metadata)
        context
      end
    end
  end

  # `make` is called on any instance, since generated functions take a reference first.
  defp metadata(rank) do
    {:ok, blank} = DPMetadata.new(0, [0], [])

    {:ok, config} =
      ParallelConfig.new([], data_parallel_size: length(@counts), data_parallel_rank: rank)

    {:ok, metadata} = DPMetadata.make(blank, config, Enum.at(@counts, rank), @counts)
    metadata
  end

  defp failing_block do
    metadata = metadata(0)
    {:ok, whole_step} = DPMetadata.sp_local_sizes(metadata, 2)

    try do
      SnakeBridge.with_python whole_step do
        raise "boom"
      end
    rescue
      error in RuntimeError -> IO.puts("the block failed with #{inspect(error.message)}")
    end

    # The sizes are gone although the block failed. A bare None arrives as text.
    {:ok, "None"} = DPMetadata.local_sizes(metadata)
  end

  defp refused_calls do
    metadata = metadata(0)

    for {what, result} <- [
          {"a size of zero", DPMetadata.sp_local_sizes(metadata, 0)},
          {"no context", DPMetadata.get_chunk_sizes_across_dp_rank(metadata)},
          {"a wrong maximum", DPMetadata.new(1, @counts, [])}
        ] do
      # The pool's error holds Python's, with its type, message and traceback.
      {:error, %Snakepit.Error{details: %{reason: reason}}} = result
      IO.puts("#{what}: #{reason.python_type}: #{reason.message}")
    end
  end
end
