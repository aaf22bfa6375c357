defmodule LockstepExample.MixProject do
  use Mix.Project

  def project do
    [
      app: :lockstep_example,
      version: "0.1.0",
      elixir: "~> 1.18",
      deps: deps(),
      python_deps: python_deps(),
      # Reads the Python classes when the project is compiled, and writes a module for each.
      compilers: [:snakebridge] ++ Mix.compilers()
    ]
  end

  def application, do: [extra_applications: [:logger]]

  # From Hex, or from the folders in ELIXIR_SOURCES, separated by spaces and each named after its package: SnakeBridge
  # and Snakepit, and any of their dependencies.
  defp deps do
    case System.get_env("ELIXIR_SOURCES", "") |> String.split() do
      [] -> [{:snakebridge, "~> 0.16.0"}]
      folders -> for folder <- folders, do: {String.to_atom(Path.basename(folder)), path: folder, override: true}
    end
  end

  # `:stdlib` means: installed already, here in the environment that SNAKEPIT_PYTHON (while compiling) and SNAKEBRIDGE_VENV
  # (at run time) name. From a package index it is
  # `{:lockstep, "0.1.0", pypi_package: "lockstep-moe", include: [...]}`.
  defp python_deps, do: [{:lockstep, :stdlib, include: ["DPMetadata", "ParallelConfig"]}]
end
