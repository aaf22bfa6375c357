# Token counts of all ranks. Nothing is imported here: most of these modules are used without torch.
