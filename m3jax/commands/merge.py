"""Merges a base and fine-tuned models into a checkpoint that transformers loads.

The recipe is --config; everything else is a flag. `--dry_run` first prints the plan and
all that does not fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3jax.checkpoints.errors import CheckpointError
from m3jax.commands import (
    allocator,
    config,
    distributed,
    help,
    mesh,
    process,
    pushing,
    replay,
    reporting,
)
from m3jax.commands.cli import UsageError, define, define_names, names, need
from m3jax.recipe import Recipe
from m3jax.recipe.documents import Document, renamed
from m3jax.recipe.tokenizer import check_vocabulary

if TYPE_CHECKING:
    from m3jax.engine.execution import Execution
    from m3jax.moe.document import Mixture

USAGE = "m3jax merge --base=DIR --models=A,B[,C...] --output=DIR [--config=FILE]"
SHARED = [pushing, distributed]
GROUPS = {
    "Inputs": ("statistics", "rename", "strict", "allow_nonfinite"),
    "Tokenizer": ("tokenizer_from", "chat_template", "copy_tokenizer"),
    "Output": ("output_format", "documents", "fsync"),
    "Running": ("threads", "chunk_size", "executor", "mesh", "profile"),
}
ROWS = config.ROWS
MORE_HELP = [
    "",
    "Fields of the recipe; `m3jax methods NAME` says what those of a method mean:",
    *help.words(config.field_names()),
]

_BASE = define(
    "base",
    str,
    "The base model: a folder, a file or org/name; safetensors, .bin, GGUF, Orbax, "
    "Flax msgpack.",
)
_MODELS = define_names("models", "The fine-tuned models, comma-separated.")
_STATISTICS = define_names(
    "statistics",
    "One checkpoint per model of what was measured (Fisher, Gram), for methods that "
    "read it.",
)
_OUTPUT = define("output", str, "The folder to make.")
_SEED = define("seed", int, "Of ratios and masks. [0]")
_DOCUMENTS = define(
    "documents",
    str,
    "Of a --config of several documents: the folder for the results of those with a "
    "name, which stay. [OUTPUT.documents]",
)
_OVERWRITE = define("overwrite", bool, "Replace a previous m3jax output.")
_RESUME = define("resume", bool, "Continue an interrupted merge.")
_DRY_RUN = define("dry_run", bool, "Print the plan and stop.")
_ALLOW_NONFINITE = define(
    "allow_nonfinite", bool, "Merge NaN and infinity instead of refusing them."
)
_TOKENIZER_FROM = define(
    "tokenizer_from",
    str,
    "Model whose tokenizer, generation config and end tokens go along. [base]",
)
_CHAT_TEMPLATE = define(
    "chat_template",
    str,
    "Of the output: a model's, with its end tokens; auto; chatml, llama3, mistral, "
    "alpaca, exaone; a template or a .jinja file. [the tokenizer's]",
)
_COPY_TOKENIZER = define(
    "copy_tokenizer",
    bool,
    "Write the tokenizer and chat template beside the model.",
    True,
)
_STRICT = define(
    "strict", bool, "Refuse models that differ in more than their weights."
)
_RENAME = define(
    "rename",
    tuple,
    "REGEX=REPLACEMENT for models' names that the base does not have; repeatable.",
)
_THREADS = define("threads", int, "Reading, computing, writing threads.")
_CHUNK_SIZE = define("chunk_size", int, "Elements worked on at a time.")
_OUTPUT_FORMAT = define(
    "output_format",
    ["safetensors", "orbax"],
    "Of the output; without it, that of the base (or of the first model). Flax's "
    "msgpack becomes safetensors.",
)
_EXECUTOR = define(
    "executor",
    ["streamed", "sharded"],
    "In chunks from file to file, or all models in the memory of all devices.",
    "streamed",
)
_MESH = define(
    "mesh",
    list,
    "Sharded: how the devices split tensors, such as rows=2,columns=4. "
    "[rows=ALL DEVICES]",
)
_FSYNC = define("fsync", bool, "Wait until the disk has the output.", True)
_PROFILE = define("profile", str, "Folder for a profiler trace.")

prepare = config.prepare  # --config, whose fields depend on the file it names


def named() -> tuple[str | None, list[str]]:
    """What --base and --models name."""
    return _BASE.value, names(_MODELS) or []


def main(positional: list[str]) -> int:
    asked = config.asked(
        _BASE.value, names(_MODELS), _SEED.value, rename=_RENAME.value or ()
    )
    recipe, base, models, seed = _recipe(asked), asked.base, asked.models, asked.seed
    statistics = names(_STATISTICS) or asked.statistics
    if asked.mixture is not None:
        base, models = None, [asked.mixture.base]
    output = _OUTPUT.value
    need(USAGE, models=models, output=output or _DRY_RUN.value)
    for own in (*asked.documents, Document(base, tuple(models), recipe)):
        own.recipe.check(num_models=len(own.models), has_base=own.base is not None)
        check_vocabulary(own.recipe.vocabulary, own.inputs)

    allocator.keep_freed_memory()
    # Only now JAX, which takes a second to import.
    prints = _DRY_RUN.value or distributed.start()
    if not distributed.started():  # several take leave of each other
        process.keep_programs()
        process.leave_at_once()
    to = None
    if prints:
        again = _OVERWRITE.value or _RESUME.value
        to = pushing.asked(output, overwrite=again)
    from m3jax.engine.execution import Execution
    from m3jax.engine.inputs import MismatchError
    from m3jax.engine.prepare import prepare

    execution = Execution(
        threads=_THREADS.value,
        chunk_size=_CHUNK_SIZE.value,
        overwrite=_OVERWRITE.value,
        resume=_RESUME.value,
        allow_nonfinite=_ALLOW_NONFINITE.value,
        fsync=_FSYNC.value,
        strict=_STRICT.value,
        tokenizer_from=_TOKENIZER_FROM.value or asked.tokenizer_from,
        output_format=_OUTPUT_FORMAT.value,
        executor=_EXECUTOR.value,
        mesh=mesh.sizes(_MESH.value),
    )
    if _DRY_RUN.value:
        reporting.notes(asked.notes)
    if _DRY_RUN.value:
        try:
            if asked.documents:
                last = Document(base, tuple(models), recipe)
                _plan_documents([*asked.documents, last], seed, execution)
                return 0
            with (
                _built(asked.mixture, models, seed) as given,
                prepare(base, given, recipe, seed, execution, statistics) as prepared,
            ):
                print(reporting.plan(prepared, output))
        except MismatchError as error:
            print("\n".join(error.mismatches))
            count = len(error.mismatches)
            raise CheckpointError(
                f"the checkpoints do not fit: {count} mismatch{'es' * (count > 1)}"
                + (f"; {error.hint}" if error.hint else "")
            ) from None
        return 0

    from m3jax.checkpoints.output.destination import check_free
    from m3jax.checkpoints.places import store
    from m3jax.engine.documents import check_inputs, merge_named
    from m3jax.engine.merge import merge
    from m3jax.engine.progress import Progress

    assert output is not None
    shown = reporting.progress() if prints else contextlib.nullcontext()
    with _profiled(_PROFILE.value), shown as progress:
        named = {}
        if asked.documents:
            folder = _documents_folder()
            check_inputs([*asked.documents, Document(base, tuple(models), recipe)])
            check_free(
                store.parse(output),
                overwrite=execution.overwrite,
                resume=execution.resume,
            )
            paths = merge_named(
                asked.documents,
                folder,
                seed=seed,
                execution=execution,
                progress=progress or Progress(),
            )
            base = base and renamed(base, paths)
            models = [renamed(model, paths) for model in models]
            recipe = recipe.renamed(lambda own: renamed(own, paths))
            named = {
                paths[own.name or ""]: own.renamed(paths) for own in asked.documents
            }
        with _built(asked.mixture, models, seed) as given:
            result = merge(
                base,
                given,
                output,
                recipe,
                seed=seed,
                execution=execution,
                progress=progress,
                statistics=statistics,
                documents=named,
            )
    if prints:
        other = replay.differing(asked.record, result.checksums)
        reporting.notes([*asked.notes, *([other] if other else [])])
        print(reporting.summary(result, profile=_PROFILE.value is not None))
    if to is not None:
        print(f"{'pushed':11}{pushing.push(Path(result.output), to)}")
    return 0


def _documents_folder() -> Path:
    return Path(_DOCUMENTS.value or f"{_OUTPUT.value}.documents")


def _plan_documents(
    documents: Sequence[Document], seed: int, execution: Execution
) -> None:
    """Prints a plan of each, in order."""
    from m3jax.engine.documents import planned

    with tempfile.TemporaryDirectory() as scratch:
        for own, prepared in planned(
            documents, Path(scratch), seed=seed, execution=execution
        ):
            output = _OUTPUT.value
            if own.name is not None:
                output = output and str(_documents_folder() / own.name)
            plan = reporting.document_plan(own, prepared, output)
            print(plan.replace(f"{scratch}/", ""))


def _recipe(asked: config.Asked) -> Recipe:
    """The recipe, with what the flags say of the tokenizer."""
    changes: dict[str, Any] = {}
    template = _CHAT_TEMPLATE.value
    if template is not None:
        if template.endswith(".jinja"):
            template = _text(template)
        changes["chat_template"] = template
    if not _COPY_TOKENIZER.value:
        changes["copy"] = False
    if not changes:
        return asked.recipe
    tokenizer = dataclasses.replace(asked.recipe.tokenizer, **changes)
    return asked.recipe.with_fields(tokenizer=tokenizer)


def _text(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise UsageError(f"--chat_template={file}: {why}") from None


def failed(code: int) -> None:
    """See `cli.run`."""
    distributed.leave_after_failure(code)


@contextlib.contextmanager
def _built(mixture: Mixture | None, models: list[str], seed: int) -> Iterator[Any]:
    """The models, or in their place the mixture of experts that is asked for."""
    if mixture is None:
        yield models
        return
    from m3jax.moe.build import opened

    with opened(mixture, seed) as checkpoint:
        yield checkpoint


@contextlib.contextmanager
def _profiled(folder: str | None) -> Any:
    if folder is None:
        yield
        return
    import jax

    with jax.profiler.trace(folder):
        yield
