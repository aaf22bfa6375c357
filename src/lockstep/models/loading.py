"""Loads a Transformers MoE model over ranks: each rank reads the dense weights and its own experts only."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lockstep.coordination.groups import Start
from lockstep.errors import ConfigurationError, PeerFailedError, RankAbsentError
from lockstep.extras import lacking
from lockstep.models import transformers_internals as internals
from lockstep.models.arguments import Arguments, change_config, read_arguments
from lockstep.models.checkpoint import (
    StoredTensor,
    check_config,
    check_experts,
    check_files,
    check_room,
    check_scales,
    holds_fp8_blocks,
    refuse_disguised,
    refuse_leftovers,
    refuse_part_blocks,
    refuse_two_names,
    undeclared_quantisation,
)
from lockstep.models.experts_modules import expect_fp8, find_experts, quantising, shard_empty, shard_experts, slots_of
from lockstep.models.options import QUANTIZE_EXPERTS
from lockstep.moe.experts import kernels_read_fp8
from lockstep.moe.placement import Placement

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

# Quantisations that Transformers undoes during loading, tested with experts split over ranks.
_DEQUANTISED_ON_LOAD = ("mxfp4", "fp8")


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    ep_rank: int = 0,
    ep_size: int = 1,
    placement: Placement | None = None,
    tp_mesh: DeviceMesh | None = None,
    process_group: ProcessGroup | None = None,
    deadline_s: float = 30.0,
    quantize_experts: str = "auto",
    **kwargs: Any,
) -> Any:
    """Load a checkpoint's dense weights and the experts in this rank's slots; other experts are never read.

    Experts in fp8, see `lockstep.from_pretrained`, need `LocalExperts`: in a single process call `run_alone`.
    Dense weights on a CPU stay views of the files unless the dtype is converted. Over a one-dimensional `tp_mesh`,
    attention is split by the model's own plan. With a `process_group`, an error on one rank is raised on all ranks.
    """
    if not 0 <= ep_rank < ep_size:
        raise ConfigurationError(f"ep_rank must be in 0..ep_size - 1, got ep_rank {ep_rank} and ep_size {ep_size}")
    if says := lacking("transformers", "safetensors"):
        raise ConfigurationError(says.format("from_pretrained"))
    if quantize_experts not in QUANTIZE_EXPERTS:
        names = ", ".join(QUANTIZE_EXPERTS)
        raise ConfigurationError(f"quantize_experts must be one of {names}, got {quantize_experts!r:.80}")
    arguments = read_arguments(kwargs)
    place = str(arguments.device if arguments.device is not None else "cpu")
    start = Start(process_group) if process_group is not None and process_group.size() > 1 else None
    together = functools.partial(_on_all_ranks, start, str(path), deadline_s)
    folder, config, model_class, quantization, tensors = together(lambda: _look(path, arguments))

    def load() -> Any:
        has_blocks = holds_fp8_blocks(tensors)
        wants_fp8 = quantize_experts == "fp8" or (quantize_experts == "auto" and kernels_read_fp8(torch.device(place)))
        keeps_fp8, makes_fp8 = has_blocks and wants_fp8, not has_blocks and quantize_experts == "fp8"
        if makes_fp8:
            refuse_part_blocks(tensors)
        if placement is not None:
            check_room(tensors, placement, torch.device(place), makes_fp8)
        slots: dict[str, tuple[int, ...]] = {}  # what each experts module is to hold here; filled on the way
        to_quantise: dict[str, Any] = {}

        def distribute(model: Any) -> None:
            found = find_experts(model)
            refuse_disguised(model, tensors)
            refuse_two_names(model, tensors)
            for layer, (name, module) in enumerate(found):
                _check_top_k(model.config, name, module)
                slots[name] = slots_of(found, layer, ep_rank, ep_size, placement)
                if (keeps_fp8 or makes_fp8) and module.is_transposed:
                    raise ConfigurationError(
                        f"quantize_experts={quantize_experts!r}: the weights of {name} ({type(module).__name__}) are "
                        "transposed, and experts of that kind stay in 16 bits"
                    )
                if keeps_fp8:
                    expect_fp8(module)
                elif makes_fp8:
                    to_quantise[name] = module
            if tp_mesh is not None and tp_mesh.size() > 1:
                internals.split_attention(model, tp_mesh, slots)
            if ep_size > 1:
                for name, module in found:
                    shard_empty(module, slots[name], torch.device(place).type)

        def on_loaded(model: Any, loading_info: Any) -> None:
            # Before Transformers initialises missing weights: on a split model that would be a collective, joined
            # only by the ranks that miss something.
            _refuse_incomplete(model, loading_info)
            for name, module in find_experts(model):
                shard_experts(module, slots[name])

        loading_class = internals.sharding_class(
            model_class, distribute=distribute, on_loaded=on_loaded, local_parameters_of=slots, keeps_fp8=keeps_fp8
        )
        with _settings(shows_progress=ep_rank == 0), _as_configuration_error(folder), quantising(to_quantise):
            model, loading_info = loading_class.from_pretrained(
                folder,
                config=config,
                dtype=arguments.dtype,
                device_map={"": place},
                # Any object will do: the sharding class arranges the ranks itself.
                distributed_config=internals.no_distribution(),
                use_safetensors=True,
                output_loading_info=True,
                **({"quantization_config": quantization} if quantization is not None else {}),
                **arguments.handed_on,
            )
            refuse_leftovers(model, loading_info["unexpected_keys"], quantization is not None)
        model.__class__ = model_class
        model.config.distributed_config = None
        return (model, loading_info) if arguments.output_loading_info else model

    return together(load)


def _look(path: str | os.PathLike[str], arguments: Arguments) -> tuple[Path, Any, Any, Any, dict[str, StoredTensor]]:
    """Return the checkpoint's folder, config, model class, dequantisation and checked tensors."""
    folder = _resolve(path, arguments.hub, arguments.subfolder)
    config = _config(folder if arguments.config is None else arguments.config, arguments.trust_remote_code)
    change_config(config, arguments.config_changes)
    quantization = _dequantisation(config, folder)
    tensors = check_files(folder, getattr(config, "transformers_weights", None))
    if quantization is None:
        undeclared_quantisation(folder, tensors)
        check_experts(tensors)
    else:
        check_scales(tensors, getattr(quantization, "weight_block_size", None))
    return folder, config, _class_of(config, folder, arguments.trust_remote_code), quantization, tensors


def _resolve(path: str | os.PathLike[str], hub: dict[str, Any], subfolder: str) -> Path:
    """Return a checkpoint's folder; for a Hub id, its folder in the local cache."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or len(folder.parts) > 2 or str(path).startswith("."):
            raise ConfigurationError(f"no checkpoint at {folder}: there is no such folder")
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=patterns, **hub))
        except Exception as error:
            raise ConfigurationError(
                f"no checkpoint {str(path)!r}: there is no such folder, and as a Hub id (revision "
                f"{hub.get('revision', 'main')}) it could not be loaded: {type(error).__name__}: "
                f"{str(error).splitlines()[0]}"
            ) from error
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise ConfigurationError(f"subfolder must be a folder inside of {folder}, got {subfolder!r}")
    if not (folder / subfolder).is_dir():
        raise ConfigurationError(f"no checkpoint at {folder / subfolder}: there is no such folder")
    return folder / subfolder


def _config(source: Any, trust_remote_code: bool) -> Any:
    """Return the config that was passed, or read it from a folder or file."""
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(source, PretrainedConfig):
        return copy.deepcopy(source)
    check_config(Path(source, "config.json") if Path(source).is_dir() else Path(source))
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config that is a list, a number, ... : whatever comes of taking it for a mapping
        raise ConfigurationError(f"{source} has no config.json that Transformers reads: {error}") from error


def _class_of(config: Any, folder: Path, trust_remote_code: bool) -> Any:
    """Return the class that generates text with a config."""
    import transformers

    reference = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in reference:
        return internals.class_from_folder(reference["AutoModelForCausalLM"], str(folder))
    for name in map(str, config.architectures or ()):
        if name.endswith(("ForCausalLM", "ForConditionalGeneration")) and hasattr(transformers, name):
            return getattr(transformers, name)
    others = [name for name in map(str, config.architectures or ()) if "For" in name and hasattr(transformers, name)]
    if others:
        raise ConfigurationError(
            f"{folder} holds a {others[0]}, and from_pretrained loads models that generate text: load it by "
            "Transformers' own from_pretrained and call lockstep.parallelize(model)"
        )
    if found := internals.text_class_of(config):
        return found
    kind = config.model_type
    raise ConfigurationError(f"{folder} is a {kind!r} model, for which Transformers has no class that generates text")


def _dequantisation(config: Any, folder: Path) -> Any:
    """Return the config by which Transformers dequantises the checkpoint on load; None if it is not quantised."""
    places = (config, config.get_text_config())
    found = next((one for place in places if (one := getattr(place, "quantization_config", None)) is not None), None)
    if found is None:
        return None
    settings = dict(found) if isinstance(found, dict) else found.to_dict()
    method = settings.get("quant_method")
    method = str(getattr(method, "value", method))
    if method not in _DEQUANTISED_ON_LOAD:
        raise ConfigurationError(
            f"{folder} is quantised with {method!r}; only {' and '.join(_DEQUANTISED_ON_LOAD)} are undone on load"
        )
    return internals.dequantisation_config(method, settings)


def _refuse_incomplete(model: Any, loading_info: Any) -> None:
    """Refuse files that lack a weight of the model, or have one with another shape."""
    for key, message in loading_info.conversion_errors.items():
        raise ConfigurationError(f"the files do not make up weight {key!r} of the model: {str(message).strip()}")
    if missing := sorted(key for key in loading_info.missing_keys if not internals.may_be_missing(model, key)):
        raise ConfigurationError(f"the files lack {len(missing)} weights of the model, first {missing[0]!r}")
    for key, found, expected in sorted(loading_info.mismatched_keys, key=str):
        raise ConfigurationError(
            f"weight {key!r} has shape {list(found)} in the files, the model needs {list(expected)}"
        )


def _check_top_k(config: Any, name: str, module: Any) -> None:
    """Refuse a config by which a token takes more experts than a layer has."""
    top_k, num_experts = getattr(config.get_text_config(), "num_experts_per_tok", None), module.down_proj.shape[0]
    if isinstance(top_k, int) and not 1 <= top_k <= num_experts:
        raise ConfigurationError(f"num_experts_per_tok must be in 1..{num_experts}, the experts of {name}, got {top_k}")


@contextlib.contextmanager
def _settings(shows_progress: bool) -> Iterator[None]:
    """Show Transformers' progress bar on one rank only, and switch its reading threads off; restore both afterwards.

    The threads read ahead and hold single experts until their layer is complete: with a conversion of the dtype, peak
    memory was 1.6 times that of the loaded weights.
    """
    from transformers.utils import logging

    showed_progress, before = logging.is_progress_bar_enabled(), os.environ.get(internals.ASYNC_LOAD_SWITCH)
    if not shows_progress:
        logging.disable_progress_bar()
    os.environ[internals.ASYNC_LOAD_SWITCH] = "1"
    try:
        yield
    finally:
        if showed_progress:
            logging.enable_progress_bar()
        del os.environ[internals.ASYNC_LOAD_SWITCH]
        if before is not None:
            os.environ[internals.ASYNC_LOAD_SWITCH] = before
        # Pieces of weights are below the C library's own threshold for giving freed heap back to the system.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _as_configuration_error(folder: Path) -> Iterator[None]:
    """Raise every fault of a checkpoint as a `ConfigurationError` that names it."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ConfigurationError) else f"{type(error).__name__}: "
        raise ConfigurationError(f"checkpoint {folder}: {kind}{error}") from error


def _on_all_ranks(start: Start | None, what: str, deadline_s: float, action: Callable[[], Any]) -> Any:
    """Run `action` on every rank. All ranks raise one's `ConfigurationError`; for other errors, a `PeerFailedError`."""
    if start is None:
        return action()
    key = f"loading/{start.next_number('loading')}"
    start.meeting_place(f"{key}/before", f"the loading of {what}").meet({}, deadline_s, once=True)
    result, own = None, None
    try:
        with start.whereabouts.working(f"loading {what}"):
            result = action()
    except BaseException as error:  # whatever it is, the other ranks wait for this one
        own = error
    facts = {"type": "", "message": ""} if own is None else {"type": type(own).__name__, "message": str(own)}
    after = start.meeting_place(f"{key}/after", f"the end of the loading of {what}")
    try:
        answers = after.meet(facts, deadline_s, once=True)
    except RankAbsentError:
        if own is not None:
            raise own from None
        raise
    failed = {rank: answer for rank, answer in zip(start.processes, answers, strict=True) if answer["type"]}
    if not failed:
        return result
    if own is not None and not isinstance(own, ConfigurationError):
        raise own
    for rank, answer in failed.items():
        if answer["type"] != ConfigurationError.__name__:
            text = f"{answer['type']}: {answer['message']}"
            stops = f"rank {start.processes[start.rank]} stops loading {what}"
            raise PeerFailedError(f"{stops}: rank {rank} raised {text}", rank, text) from own
    seen = "every rank" if len(failed) == len(answers) else f"rank {', '.join(map(str, failed))}"
    raise ConfigurationError(f"{next(iter(failed.values()))['message']} (seen on {seen})") from own
