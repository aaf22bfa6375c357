defmodule LockstepExample.DocumentedValues do
  @moduledoc """
  The table "What comes back" of `docs/how-to/elixir.md`, line by line; a value that differs is a `MatchError`.
  """

  require SnakeBridge

  alias Lockstep.DPMetadata

  def check do
    SnakeBridge.run_as_script(fn ->
      {:ok, metadata} = DPMetadata.new(500, [500, 200, 256], [])
      contexts(metadata)
      tensors(metadata)
      errors(metadata)
      IO.puts("what comes back: as documented")
    end)
  end

  defp contexts(metadata) do
    [500, 200, 256] = entered(DPMetadata.sp_local_sizes(metadata, 1))
    [250, 250, 100, 100, 128, 128] = entered(DPMetadata.sp_local_sizes(metadata, 2))

    {:ok, chunk} = DPMetadata.chunked_sizes(metadata, 1, 256, 1)

    SnakeBridge.with_python chunk do
      [244, 1, 1] = context
      {:ok, [244, 1, 1]} = DPMetadata.get_chunk_sizes_across_dp_rank(metadata)
      {:ok, [244, 1, 1]} = DPMetadata.local_sizes(metadata)
    end

    {:ok, "None"} = DPMetadata.local_sizes(metadata)
  end

  defp entered({:ok, sizes}) do
    SnakeBridge.with_python sizes do
      context
    end
  end

  defp tensors(metadata) do
    {:ok, cumulative} = DPMetadata.cu_tokens_across_sp(metadata, 1)
    {:ok, [500, 700, 956]} = SnakeBridge.method(cumulative, "tolist", [])
    {:ok, counts} = SnakeBridge.attr(metadata, "num_tokens_across_dp_cpu")
    {:ok, [500, 200, 256]} = SnakeBridge.method(counts, "tolist", [])
    {:ok, maximum} = SnakeBridge.attr(metadata, "max_tokens_across_dp_cpu")
    {:ok, 500.0} = SnakeBridge.method(maximum, "tolist", [])
  end

  defp errors(metadata) do
    "RuntimeError" = python_type(DPMetadata.get_chunk_sizes_across_dp_rank(metadata))
    "ConfigurationError" = python_type(DPMetadata.sp_local_sizes(metadata, 0))
    "ConfigurationError" = python_type(DPMetadata.sp_local_sizes(metadata, 2.0))
    "TokenCountError" = python_type(DPMetadata.new(8, [5, 7], []))
    "TokenCountError" = python_type(DPMetadata.new(500.0, [500, 200, 256], []))
  end

  # The pool's error holds Python's: a Snakepit.Error.PythonException, or the struct named after a built-in type.
  defp python_type({:error, %Snakepit.Error{details: %{reason: reason}}}), do: reason.python_type
end
