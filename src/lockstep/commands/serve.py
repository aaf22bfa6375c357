"""`lockstep serve`: the service's model, key and address, and a status line every second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from rich.live import Live
from rich.text import Text

from lockstep.errors import ConfigurationError
from lockstep.report.terminal import Terminal, plain
from lockstep.runner.engine import Engine
from lockstep.runner.options import EngineOptions, check_checkpoint
from lockstep.runner.ranks import describe, find_tokenizer
from lockstep.serve.options import ServeOptions
from lockstep.serve.server import open_socket, serve
from lockstep.serve.service import Service

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "LOCKSTEP_API_KEY"
_TINY_EXPERTS = 12
_MOST_RANKS_SHOWN = 16


def execute(options: EngineOptions, service: ServeOptions, host: str, port: int, chat_template: Path | None) -> None:
    """Serve until a signal, then end the process: 0 after a first signal, `128 + signal` after a second.

    Raises:
        ConfigurationError: invalid options.
        LockstepError: ranks or API processes could not be started, or kept dying.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if service.log_requests != "off":
        logging.getLogger("lockstep.serve").setLevel(logging.INFO)
    if "RANK" in os.environ:
        raise ConfigurationError("lockstep serve starts its ranks itself: run it without torchrun")
    console = Terminal(stderr=True)
    template = _read_text(chat_template) if chat_template is not None else None
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(open_socket(host, port))
        if options.model == "tiny":
            options = replace(options, model=_make_tiny(stack))
        if template is not None:
            _check_chat_template(options.model, template)

        def start_engine() -> Engine:
            given = asdict(options)
            engine = Engine(given.pop("model"), **given)
            if template is not None:
                engine.tokenizer.chat_template = template
            console.print(describe(engine.about, options.world_size), style="dim", soft_wrap=True)
            return engine

        def end_now(status: int) -> NoReturn:
            """End the process, with any remaining ranks and an engine that is still starting."""
            stack.close()
            console.show_cursor()
            sys.stderr.flush()
            os._exit(status)

        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        ranks = f"{options.world_size} rank{'s' * (options.world_size > 1)}"
        console.print(f"starting {ranks} on this host", style="dim")

        def say(text: str) -> None:
            console.print(text, soft_wrap=True)

        async def serve_until_told() -> NoReturn:
            show = partial(_show, console=console, url=url)
            await serve(start_engine, service, listener, show, say, end_now)
            end_now(0)

        asyncio.run(serve_until_told())


def _check_chat_template(model: str, template: str) -> None:
    """Raise `ConfigurationError` if Transformers cannot compile the template."""
    from jinja2 import TemplateSyntaxError

    check_checkpoint(model)
    tokenizer = find_tokenizer(model)
    if tokenizer is None:
        raise ConfigurationError(f"chat_template needs a tokenizer, and the checkpoint {model} has none to read")
    chat = [{"role": "user", "content": "a"}]
    try:
        tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ConfigurationError(f"chat_template is no Jinja: line {error.lineno}: {error.message}") from None
    except Exception as error:  # a template may expect different messages
        logger.warning("the chat template refuses a chat of one user message: %s", error)


async def _show(service: Service, console: Terminal, url: str) -> None:
    """Report when the service is ready. Then update one line on a terminal; elsewhere print a line after new tokens."""
    while service.state != "ready":
        await asyncio.sleep(0.05)
    console.print(f"ready: {url}/v1 (health: {url}/health, figures: {url}/metrics)", soft_wrap=True)
    with Live(console=console, transient=True, auto_refresh=False) as live:
        tokens, at_s = service.metrics.num_tokens, time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            now_tokens, now_s = service.metrics.num_tokens, time.monotonic()
            line = _line(service, (now_tokens - tokens) / (now_s - at_s))
            if console.is_terminal:
                live.update(Text(plain(line), style="dim"), refresh=True)
            elif now_tokens != tokens or service.num_waiting:
                console.print(line, style="dim", soft_wrap=True)
            tokens, at_s = now_tokens, now_s


def _line(service: Service, tokens_per_s: float) -> str:
    rows = service.engine.stats.num_tokens_across_dp[:_MOST_RANKS_SHOWN] if service.engine is not None else []
    shown = " ".join(f"{count:>4}" for count in rows)
    counts = f"running {service.num_running:>4}, waiting {service.num_waiting:>4}"
    return f"{service.state}: rows {shown}; {counts}; {tokens_per_s:,.0f} tokens/s"


def _make_tiny(stack: contextlib.ExitStack) -> str:
    from transformers.utils import logging as transformers_logging

    from lockstep.models.tiny import make_tiny

    transformers_logging.disable_progress_bar()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-serve-"))
    return str(make_tiny(Path(folder, "tiny"), num_experts=_TINY_EXPERTS))


def read_api_key(given: str | None, file: Path | None) -> str | None:
    """Return the API key from the option, the file's first line, or the environment; None if there is none.

    Raises:
        ConfigurationError: a key that does not fit into a header, or two keys.
    """
    if given is not None and file is not None:
        raise ConfigurationError("give either api_key or api_key_file")
    key = given if given is not None else os.environ.get(API_KEY_VARIABLE)
    if file is not None:
        key = _read_text(file).split("\n", 1)[0]
    if key is not None and not (key.strip() == key and key.isascii() and key.isprintable() and key):
        raise ConfigurationError(
            "an API key must be one or more printable ASCII characters, without spaces at its ends"
        )
    return key


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file} is no text in UTF-8") from None
