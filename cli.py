"""The command line: options in, library calls, results on stdout, progress and errors on stderr.

Every room is imported inside the command that needs it, so that `wherefrom --help` starts at once. Exit codes: 0 done, 1 error, 2 usage,
3 not found or incompatible, 4 integrity, 130 interrupted. An option is taken from the command line, else from the environment
(WHEREFROM_BUILD_RANK for `wherefrom build --rank`), else from the file given with --config, else it has its default.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .store.errors import UsageError, WherefromError
from .store.printable import printable, printable_line, to_json

if TYPE_CHECKING:
    from .client import Client
    from .evaluation.checks import Report
    from .query.answers import Query
    from .remote import RemoteClient
    from .store.corpus import Fields
    from .store.manifest import Addition, Build

_LARGEST_CONFIG = 1 << 14
_NAMED = 5


class _Group(click.Group):
    """Turns the library's errors into one sentence on stderr and their exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a character that the terminal's encoding lacks is spelled out
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.Exit as signal:
            sys.exit(signal.exit_code)
        except click.ClickException as error:
            _say(error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else "", err=True)
            _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _say("Interrupted. What a build has finished is kept; the same command goes on from there.", err=True)
            sys.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        except WherefromError as error:
            _fail(self._as_flags(str(error)), error.exit_code)
        except OSError as error:
            _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
        except (EOFError, RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError, ImportError) as error:
            if os.environ.get("WHEREFROM_TRACEBACK"):
                raise
            _fail(_unforeseen(error), 1)
        except MemoryError:
            _fail("out of memory; use a smaller --batch-tokens, fewer --workers or a smaller --rank", 1)

    def _as_flags(self, message: str) -> str:
        """A message of the library, which names options as `batch_tokens`, with the command line's names of them."""
        commands = [
            *self.commands.values(),
            *(c for group in self.commands.values() if isinstance(group, click.Group) for c in group.commands.values()),
        ]
        flags = {
            parameter.name: max(parameter.opts, key=len)
            for command in commands
            for parameter in command.params
            if isinstance(parameter, click.Option)
        }
        return re.sub("`([a-z_]+)`", lambda name: flags.get(name[1], name[0]), message)


def _unforeseen(error: Exception) -> str:
    import traceback

    at = traceback.extract_tb(error.__traceback__)[-1]
    reason = str(error).splitlines()[0] if str(error) else "no reason given"
    return (
        f"{type(error).__name__}: {reason} (at {at.filename}:{at.lineno}); if that is not your own code, it is a defect of Wherefrom: "
        "WHEREFROM_TRACEBACK=1 shows where it comes from"
    )


def _fail(message: str, code: int) -> None:
    _say(f"Error: {message}", err=True)
    sys.exit(code)


def _say(line: str, err: bool = False) -> None:
    """Print a line; file names and stored strings in it cannot command the terminal."""
    click.echo(printable(line), err=err)


def _print_json(value: Any) -> None:
    """Print JSON on one line."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "")
    click.echo(to_json(value, ascii_only=encoding != "utf8"))


def _config_file(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        given = _toml(value)
        known = {p.name: p for p in ctx.command.params if p.name != param.name}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise click.BadParameter(
                f"{value}: there is no option {unknown[0]!r}; a key is an option's name with underscores, such as fit_examples"
            )
        ctx.default_map = {**(ctx.default_map or {}), **{name: _as_typed(known[name], item, value) for name, item in given.items()}}
    return value


def _toml(file: str) -> dict[str, Any]:
    """A TOML file of options, which is small: the parser takes a time that grows with the square of what it is given."""
    import tomllib

    if not Path(file).is_file():
        raise click.BadParameter(f"there is no file {file}")
    try:
        with open(file, "rb") as opened:
            content = opened.read(_LARGEST_CONFIG + 1)
        if len(content) > _LARGEST_CONFIG:
            raise click.BadParameter(f"{file} is longer than {_LARGEST_CONFIG >> 10} KiB, too long for a file of options")
        return tomllib.loads(content.decode())
    except RecursionError as error:
        raise click.BadParameter(f"{file} cannot be read as TOML: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{file} cannot be read as TOML: it is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise click.BadParameter(f"{file} cannot be read as TOML: {error}") from error


def _as_typed(option: click.Parameter, item: Any, file: str) -> Any:
    """A value of a TOML file as it would be typed, so that click checks both alike."""
    flag = getattr(option, "is_flag", False)
    items = item if isinstance(item, list) else [item]
    fits = all(isinstance(i, bool) if flag else isinstance(i, (str, int, float)) and not isinstance(i, bool) for i in items)
    if not fits or (isinstance(item, list) and not option.multiple):
        raise click.BadParameter(f"{file}: {option.name} cannot be {item!r}")
    return item if flag else [str(i) for i in items] if option.multiple else str(item)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "WHEREFROM"})
@click.version_option(package_name="wherefrom")
def main() -> None:
    """Which training examples made the model say this?

    Build an index of a model's training corpus once, then ask it.

    \b
      wherefrom demo                                      see it work, in a minute or two
      wherefrom build --model DIR --data FILE --out INDEX
      wherefrom query INDEX --prompt "The capital of France is" --completion " Paris"
    """
    # Threads that spin while they wait for one another take several times as long where other programs want the cores, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")(function)


def _together(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Several options as one decorator, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_task_option = click.option(
    "--task", default="causal-lm", show_default=True, help="causal-lm, mlp (vectors with labels), or module:Class of your own."
)
_own_task_option = click.option("--task", help="Of an index that was built with a task of your own: its module:Class again.")
_moved_model_option = click.option(
    "--model", multiple=True, help="Where the model lies now, if it was moved; of several models, all in order."
)
_mode_option = click.option("--mode", default="influence", show_default=True, help="influence or cosine.")
_worker_options = _together(
    click.option("--workers", type=int, default=1, show_default=True, help="Processes, by Ray; 1 stays in this one."),
    click.option("--threads", type=int, default=1, show_default=True, help="Threads of each worker."),
    click.option("--address", help="A Ray cluster's address.  [default: a local Ray]"),
)
_device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda, cuda:N, or map: a language model too large for one GPU, spread over all of them.",
)
_where_model_lies = _together(
    _moved_model_option,
    _device_option,
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    _own_task_option,
)

_model_options = _together(
    click.option("--revision", multiple=True, help="Branch, tag or commit of a hub model; repeat it for several checkpoints of one."),
    click.option("--dtype", default="float32", show_default=True, help="The model's precision: float32, bfloat16 or float64."),
    _device_option,
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
)
_document_options = _together(
    click.option("--text-field", help="Column with the text; the loss is on all of it.  [default: text]"),
    click.option("--prompt-field", help="Column with the prompt.  [default: prompt]"),
    click.option("--completion-field", help="Column with the completion; the loss is on it alone.  [default: completion]"),
    click.option("--messages-field", help="Column with chat messages; the loss is on the assistant's turns.  [default: messages]"),
    click.option("--id-field", default="id", show_default=True, help="Column with the id (else file:line)."),
    click.option("--source-field", default="source", show_default=True, help="Column with the source (else the file's name)."),
    click.option(
        "--split-text",
        default="file",
        show_default=True,
        help="A document of a text file (.txt, .md): the whole file, or what stands between blank-lines.",
    ),
    click.option("--max-tokens", type=int, help="Longest example.  [default: the model's context, at most 2048]"),
    click.option("--long", default="split", show_default=True, help="Longer documents: split into chunks, or truncate."),
    click.option("--append-eos/--no-append-eos", default=True, show_default=True, help="End each document with the end-of-text token."),
    click.option("--bad-documents", default="error", show_default=True, help="A document that cannot be used: error, or skip and count."),
)
_index_options = _together(
    click.option(
        "--layers",
        multiple=True,
        help="Glob over layer names, such as 'h.[0-3].mlp.*'; repeatable.  [default: all inside the blocks; for a number of bytes, "
        "those with more inputs than outputs]",
    ),
    click.option(
        "--bytes-per-example",
        type=int,
        help="Of a row: components and their sizes follow from it.  [default: 800 where nothing below says what a row is made of]",
    ),
    click.option("--components", help="Parts of a row: blocks, head, embeddings; several with commas.  [default: by bytes, else blocks]"),
    click.option("--projection", help="random or pca.  [default: random; for a number of bytes pca]"),
    click.option(
        "--rank", type=int, help="Coordinates kept of a layer's inputs and outputs each.  [default: 16; for a number of bytes 128]"
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="For projections, the fitting sample and sampled labels."),
    click.option(
        "--curvature", default="auto", show_default=True, help="fisher, ekfac, kfac, diagonal, identity, or auto (by layer size)."
    ),
    click.option(
        "--labels",
        help="Labels of the curvature: data, sampled from the model, or expected (all classes).",
    ),
    click.option("--fit-examples", type=int, default=5000, show_default=True, help="Examples that the curvature is fitted on."),
    click.option(
        "--damping", type=float, help="Relative to the mean eigenvalue; a query can change it.  [default: 0.1, for vocabularies 1]"
    ),
    click.option("--row-dtype", help="Coordinates of blocks: float32, float16, int8 or 1bit.  [default: float32]"),
    click.option("--coordinates", type=int, help="Stored of the blocks; fewer than there are, are kept or mixed.  [default: all]"),
    click.option("--head-bits", type=int, help="Bits of each token of the head.  [default: 64]"),
    click.option("--head-keys", type=int, help="Tokens of the head kept of an example.  [default: all that it predicts]"),
    click.option("--head-others", type=int, default=0, help="Tokens of the head beside those: the most probable.  [default: 0]"),
    click.option("--embedding-bits", type=int, help="Bits of each token of the embeddings.  [default: 64]"),
    click.option("--embedding-keys", type=int, help="Tokens of the embeddings kept of an example.  [default: all that it reads]"),
    click.option("--hidden", is_flag=True, help="Keep mean hidden states (2 bytes a coordinate), for the baseline beside answers."),
    click.option("--shard-rows", type=int, help="Examples in a shard.  [default: about 16 MiB of rows]"),
    click.option("--batch-tokens", type=int, help="Padded tokens in a batch.  [default: 2048, on a GPU 16384]"),
    _worker_options,
    click.option("--config", callback=_config_file, is_eager=True, expose_value=False, help="TOML file with any of these options."),
)


_corpus_options = _together(
    click.option(
        "--model",
        required=True,
        multiple=True,
        help="Directory or hub id of a causal language model (safetensors); repeat it for checkpoints or an ensemble.",
    ),
    click.option(
        "--data",
        required=True,
        multiple=True,
        help="JSONL, CSV, Parquet or text file (also .gz, .bz2, .xz, .zst), folder, saved dataset (of one split, folder:split), hub "
        "name:split; repeatable.",
    ),
)


def _fields_of(options: dict[str, Any]) -> "Fields":
    """Takes the columns' names out of a build's options."""
    from .store.corpus import Fields, Form

    names = {form: options.pop(f"{form}_field") for form in ("text", "prompt", "completion", "messages")}
    forms: dict[Form, bool] = {
        "text": names["text"] is not None,
        "completion": names["prompt"] is not None or names["completion"] is not None,
        "chat": names["messages"] is not None,
    }
    named: list[Form] = [form for form, given in forms.items() if given]
    if len(named) > 1:
        raise UsageError("name one form of document: --text-field, --prompt-field with --completion-field, or --messages-field")
    given = {form: name for form, name in names.items() if name is not None}
    others = {"id": options.pop("id_field"), "source": options.pop("source_field"), "split_text": options.pop("split_text")}
    return Fields(form=named[0] if named else "auto", **others, **given)


@main.command()
@_corpus_options
@click.option("--out", required=True, help="Index directory to make.")
@_task_option
@_model_options
@_document_options
@_index_options
@_json_option
def build(as_json: bool, out: str, **options: Any) -> None:
    """Index a corpus.

    \b
      wherefrom build --model gpt2 --data corpus.jsonl --out my.wherefrom
      wherefrom build --model gpt2 --data corpus.jsonl --out big.wherefrom --bytes-per-example 2400
      wherefrom build --model run/checkpoint-500 --model run/checkpoint-1000 --data corpus.jsonl --out run.wherefrom
      wherefrom build --model ./sft --data chats.parquet --out sft.wherefrom --rank 32 --workers 4
      wherefrom build --model ./lm --data books/ --out b.wherefrom --row-dtype int8 --layers '*.mlp.*'

    A build that was interrupted goes on when the same command is given again.
    """
    fields = _fields_of(options)
    _quiet_libraries()
    from .ray_jobs.build import build as run
    from .ray_jobs.config import BuildConfig
    from .ray_jobs.progress import Console
    from .store.manifest import latest_manifest

    options = _as_config(options)
    known = latest_manifest(Path(out))
    with Console() as reporter:
        manifest = run(BuildConfig(out=out, fields=fields, **options), reporter)
    if as_json:
        from .store.index import Index

        _print_json(Index(out).summary())
        return
    done = "is already complete" if known else "is complete"
    _say(f"{out} {done}: {manifest.rows:,} rows of {' and '.join(s.name for s in manifest.components)}")
    made = manifest.build
    for tracked in made.tracked:
        _say(f"the rows measure {_tracked({**tracked.model_dump(), 'share': tracked.share})}")
    if made.skipped:
        _say(f"left out {made.skipped:,} documents that could not be used; the first: {made.skipped_first[0]}")
    for line in _not_kept(made):
        _say(line)
    if made.truncated:
        _say(f"kept only the beginning of {made.truncated:,} documents that are longer than an example may be")
    _say(f"ask it:  wherefrom query {out} " + ('--prompt "..." --completion "..."' if manifest.tokenizer else "--row 0"))


def _not_kept(record: "Build | Addition") -> Iterable[str]:
    """What of a corpus was not read or not kept, by the record of its build or addition; a line each."""
    unread = _unread(record.unread.files, record.unread.first)
    if unread:
        yield f"not read: {unread}"
    if record.left_out_columns:
        yield f"left out columns: {', '.join(f'{name} ({kind})' for name, kind in record.left_out_columns.items())}"


def _unread(files: int, first: Sequence[str]) -> str:
    """Files that were not read, in words; nothing of none."""
    return f"{files:,} file{'s' * (files > 1)}: {', '.join(first[:_NAMED])}{', ...' * (files > _NAMED)}" if files else ""


@main.command()
@_corpus_options
@_task_option
@_model_options
@_document_options
@_index_options
@_json_option
def plan(as_json: bool, **options: Any) -> None:
    """Say what a build would cost: rows, bytes, memory and time, from a sample and a few measured batches.

    \b
      wherefrom plan --model gpt2 --data corpus.jsonl --bytes-per-example 2400
      wherefrom plan --model ./sft --data chats.parquet --rank 32 --workers 4 --json
    """
    fields = _fields_of(options)
    _quiet_libraries()
    from .ray_jobs.config import BuildConfig
    from .ray_jobs.plan import estimate

    cost = estimate(BuildConfig(out="(nothing)", fields=fields, **_as_config(options)))
    if as_json:
        _print_json(cost.to_dict())
        return
    _say(f"{cost.documents:,} documents, about {cost.rows:,} rows and {cost.tokens:,} tokens")
    for component in cost.components:
        about = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in component.items() if k != "name" and v is not None)
        _say(f"  {component['name']}: {about}")
    _say(f"{cost.bytes_per_example:,} bytes an example: {cost.bytes_of_rows:,} bytes of rows, {cost.encoder_bytes:,} of the encoder")
    _say(f"about {cost.memory_per_worker >> 20:,} MiB of memory for each of {cost.workers} workers")
    _say(f"about {cost.fit_seconds:,} s to fit and {cost.row_seconds:,} s for the rows, on a machine that does nothing else")


@main.command()
@click.argument("index")
@click.option("--data", required=True, multiple=True, help="Documents to add, as for build; repeatable.")
@_where_model_lies
@click.option("--batch-tokens", type=int, help="Padded tokens in a batch.  [default: the build's]")
@_worker_options
@_json_option
def add(index: str, data: tuple[str, ...], model: tuple[str, ...], task: str | None, as_json: bool, **how: Any) -> None:
    """Add documents to an index, under the encoder that it has.

    \b
      wherefrom add my.wherefrom --data more.jsonl
      wherefrom add my.wherefrom --data 2026/ --workers 4

    The columns are those that the index was built with. Each component's drift is said: how much longer rows are on average than those of
    the build (1: alike). Where it is far from 1 the curvature no longer fits, and the index should be built again.
    """
    _quiet_libraries()
    from .ray_jobs.change import add as run
    from .ray_jobs.change import drifted
    from .ray_jobs.progress import Console

    with Console() as reporter:
        manifest = run(Path(index), data, how, model, reporter, task)
    added = manifest.build.added[-1]
    if as_json:
        told = added.model_dump(mode="json", include={"rows", "drift", "unread", "left_out_columns"})
        _print_json({**told, "refit": drifted(added.drift)})
        return
    _say(f"{index} has {added.rows:,} rows more, {manifest.rows:,} in all; drift: {_drifts(added.drift)}")
    for line in _not_kept(added):
        _say(line)
    for name in drifted(added.drift):
        _say(f"the curvature of {name} does not fit these documents: build the index again over all of them", err=True)


def _drifts(drift: dict[str, float]) -> str:
    return ", ".join(f"{name} {ratio:g}" for name, ratio in drift.items())


@main.command()
@click.argument("index")
@click.option("--ids", help="File with an id a line, as it stands or as JSON, of examples or of whole documents; - is standard input.")
@click.option("--where", help="Delete the rows that match, such as 'source == \"web\"'.")
@_json_option
def delete(index: str, ids: str | None, where: str | None, as_json: bool) -> None:
    """Take examples out of every answer, at once; their bytes go with wherefrom compact.

    \b
      wherefrom delete my.wherefrom --ids removed.txt
      wherefrom delete my.wherefrom --where 'source == "web" and year < 2010'

    Lines of a list end at a newline; empty ones are passed over. A line that begins with a quotation mark or a brace is JSON: a text, or an
    object with an id, as in the explorer's removal list and in answers saved as JSON lines. Any other line is the id as it stands.
    """
    from .ray_jobs.change import delete as run
    from .store.corpus import read_ids

    if (ids is None) == (where is None):
        raise UsageError("say what is to be deleted: --ids FILE or --where FILTER, one of them")
    gone = run(Path(index), [] if ids is None else read_ids(ids), where)
    if as_json:
        _print_json({"deleted": gone})
    else:
        _say(f"{gone:,} rows were deleted from {index}")


@main.command()
@click.argument("index")
@click.option("--prune", is_flag=True, help="Also remove the files of older states; whoever is reading these loses them.")
@_json_option
def compact(index: str, prune: bool, as_json: bool) -> None:
    """Write shards with deleted rows again without them; rows behind them move up.

    \b
      wherefrom compact my.wherefrom --prune
    """
    from .ray_jobs.change import compact as run
    from .ray_jobs.change import prune as run_prune

    dropped = run(Path(index))
    freed = run_prune(Path(index)) if prune else 0
    if as_json:
        _print_json({"dropped": dropped, "freed_bytes": freed})
    else:
        _say(f"{dropped:,} rows were dropped from {index}" + (f", {freed:,} bytes given back" if prune else ""))


@main.command()
@click.argument("index")
def reindex(index: str) -> None:
    """Make anew what searches read beside the rows, and write it where it is missing, damaged or not what the rows give.

    \b
      wherefrom reindex my.wherefrom
    """
    from .store.files import exclusive
    from .store.index import Index

    Index(index)
    with exclusive(Path(index)):
        written = Index(index).reindex(compare=True)
    _say(f"{written:,} sets of posting lists and one-bit codes were made" if written else "all there, and of these rows")


_query_options = _together(
    click.option("--prompt", default="", help="What comes before the completion."),
    click.option("--completion", help="What the model said: the loss is on it alone."),
    click.option("--text", help="A whole text: the loss is on all of it, its end included (as in the index)."),
    click.option("--messages", help="JSON file with chat messages (or with messages and tools): the loss is on the assistant's turns."),
    click.option("--row", type=int, help="A training example, by its row; needs no model."),
    click.option("--against", help="Another completion: what made the model say the one rather than the other."),
    click.option("--span", help="A part of the completion or text, as it stands there: the loss is on its tokens alone."),
)
_score_options = _together(
    click.option(
        "--mode", default="influence", show_default=True, help="influence, cosine (all weigh the same), or loss-normalized of loss."
    ),
    click.option("--damping", type=float, help="Another damping than the build's, relative to the mean eigenvalue; exact."),
    click.option("--curvature/--no-curvature", default=True, show_default=True, help="Plain products of gradients without it."),
    click.option("--weights", help="Of components, times the index's own, such as head=1,blocks=0.5; 0 leaves one out."),
    click.option("--layers", multiple=True, help="Glob over layer names, such as 'h.[0-3].*'; the others count nothing; repeatable."),
)
_local_option = click.option("--local", is_flag=True, help="Answer in this process even if a server runs.")


@main.command()
@click.argument("indexes", nargs=-1, required=True, metavar="INDEX...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than loopback need a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8787, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option("--token-file", help="File with a token that every request must bear.")
@click.option("--batch", type=click.IntRange(1, 256), default=16, show_default=True, help="Queries answered in one pass, at most.")
@_where_model_lies
def serve(indexes: tuple[str, ...], host: str, port: int, token_file: str | None, batch: int, **model: Any) -> None:
    """Answer queries over HTTP, and in a browser: models and indexes are loaded once.

    \b
      wherefrom serve my.wherefrom                       then open http://127.0.0.1:8787
      wherefrom serve base=a.wherefrom sft=b.wherefrom --port 9000
      wherefrom serve my.wherefrom --host 0.0.0.0 --token-file token.txt

    While it runs, wherefrom query asks it and starts at once. An index that changes is picked up without a restart. The interface is
    described at /docs.
    """
    _quiet_libraries()
    from .client import Client
    from .server.run import named, read_token
    from .server.run import serve as run

    token = read_token(token_file)
    clients = {name: Client(path, **model) for name, path in named(list(indexes)).items()}
    for client in clients.values():
        client.prepare()
    run(clients, host, port, token, batch)


@main.command()
@click.argument("index")
@_query_options
@click.option("--file", help="JSON lines with prompt and completion, text, or row; - reads standard input.")
@click.option("--mean", is_flag=True, help="Answer the mean of a file's queries (times each one's weight) as one query.")
@click.option("-k", type=int, help="So many proponents, and opponents, at most.  [default: 10]")
@click.option("--opponents/--no-opponents", default=True, show_default=True, help="Examples that spoke against it, too.")
@click.option("--where", help="Search these rows alone, such as 'source == \"web\" and year >= 2020'.")
@click.option(
    "--recall",
    type=float,
    default=1.0,
    show_default=True,
    help="Below 1, dense rows are searched by quantized scan and rescore: see below.",
)
@click.option("--baselines", is_flag=True, help="Beside the answer: what BM25, mean hidden states and the norm alone would find.")
@click.option("--group-by", help="A column, such as source: the influence of each of its values, with intervals.")
@_score_options
@_where_model_lies
@_local_option
@_json_option
def query(index: str, file: str | None, weights: str | None, as_json: bool, **options: Any) -> None:
    """Ask which training examples made the model say this.

    \b
      wherefrom query my.wherefrom --prompt "The capital of France is" --completion " Paris" --against " Lyon"
      wherefrom query my.wherefrom --text "Once upon a time" -k 5 --mode cosine
      wherefrom query my.wherefrom --row 123 --no-opponents --where 'source != "wiki" and not title == None'
      wherefrom query my.wherefrom --file queries.jsonl --mean --group-by source
      wherefrom query my.wherefrom --file queries.jsonl --json > answers.jsonl

    A filter compares columns (id, document, chunk, text, source and the corpus's own) with values: ==, !=, <, <=, >, >=, in, and, or, not,
    and text columns' .startswith("..."), .endswith and .contains. Dates and times are written as ISO text, durations in seconds.

    A running server (wherefrom serve) that has the index is asked, unless --local is given; the answer is the same. Another machine's is
    named by WHEREFROM_URL, and its token by WHEREFROM_TOKEN.

    With --recall 0.99, one-bit codes say which dense rows must be read, and with probability 0.99 none of the best is missing; where too
    many would have to be read, or there are no codes (wherefrom reindex), all are, and the answer says so.
    """
    queries = _queries(file, options)
    client = _client(index, options, queries)
    answers = client.query_many(queries, weights=_weights(weights), **options)
    for answer in answers:
        if as_json:
            _print_json(answer.to_dict())
        else:
            from .query.terminal import show

            show(answer)


@main.command()
@click.argument("index")
@click.option("--row", "rows", type=int, multiple=True, help="Training example to explain, by its row; repeatable.  [default: the best 3]")
@click.option("--prompt", default="", help="What comes before the completion.")
@click.option("--completion", help="What the model said.")
@click.option("--text", help="A whole text.")
@click.option("--messages", help="JSON file with chat messages (or with messages and tools).")
@click.option("--query-row", type=int, help="Ask with a training example, by its row.")
@click.option("--against", help="Another completion: what made the model say the one rather than the other.")
@click.option("--span", help="A part of the completion or text, as it stands there.")
@click.option("--tokens/--no-tokens", default=True, show_default=True, help="Shares by token; they need the model.")
@_score_options
@_where_model_lies
@_local_option
@_json_option
def explain(
    index: str, rows: tuple[int, ...], query_row: int | None, weights: str | None, tokens: bool, as_json: bool, **options: Any
) -> None:
    """Take the score of a training example apart: by component, layer, shared token, and token of either text.

    \b
      wherefrom explain my.wherefrom --prompt "The capital of France is" --completion " Paris"
      wherefrom explain my.wherefrom --row 123 --prompt "The capital of France is" --completion " Paris" --json
      wherefrom explain my.wherefrom --row 123 --query-row 456 --no-tokens

    Components, layers and shared tokens are read from the rows, and add up to the score. Shares by token are computed anew with the model.
    """
    from .query.answers import Query

    asked = {name: options.pop(name) for name in ("prompt", "completion", "text", "against", "span")}
    query = Query(row=query_row, **asked, **_chat(options.pop("messages")))
    how: dict[str, Any] = {"weights": _weights(weights)} | {n: options.pop(n) for n in ("mode", "damping", "curvature", "layers")}
    client = _client(index, options, [query], with_model=tokens)
    if not rows:
        rows = tuple(a.row for a in client.query_many([query], **how)[0].proponents[:3])
    for explanation in client.explain(rows, query, tokens=tokens, **how):
        if as_json:
            _print_json(explanation.to_dict())
        else:
            from .query.terminal import show_explanation

            show_explanation(explanation)


@main.command()
@click.argument("index")
@click.option("--file", required=True, help="JSON lines with prompt and completion, text, or row; - reads standard input.")
@click.option("--out", required=True, help="Name of what is to be made: scores.zarr or scores.parquet.")
@_score_options
@_where_model_lies
def scores(index: str, file: str, out: str, weights: str | None, **options: Any) -> None:
    """Write every row's score for every query: a matrix.

    \b
      wherefrom scores my.wherefrom --file queries.jsonl --out scores.zarr
      wherefrom scores my.wherefrom --file queries.jsonl --out scores.parquet --mode cosine

    Zarr: an array scores [queries, rows] beside ids of rows and queries. Parquet: a line for each row, with its id and a column for
    each query. Rows that were deleted have no score (NaN).
    """
    from .query.matrix import write_scores
    from .ray_jobs.progress import Console

    queries = list(_read_queries(file))
    client = _local_client(index, options, queries)
    with Console() as reporter:
        shape = write_scores(
            client.index, lambda part: client.scores(part, weights=_weights(weights), **options), queries, Path(out), reporter
        )
    _say(f"{out} holds the scores of {shape[1]:,} rows for {shape[0]:,} queries")


def _client(index: str, options: dict[str, Any], queries: Sequence["Query"], with_model: bool = False) -> "Client | RemoteClient":
    """A client, from the options that say where the model lies, which are taken out: of a running server where these say nothing."""
    model = {name: options.pop(name) for name in ("model", "device", "trust_remote_code", "task")}
    local = options.pop("local", True)
    if not local and model == {"model": (), "device": "auto", "trust_remote_code": False, "task": None}:
        from .remote import find_server

        server = find_server(index)
        if server is not None:
            return server
    return _local_client(index, model, queries, with_model)


def _local_client(index: str, options: dict[str, Any], queries: Sequence["Query"], with_model: bool = False) -> "Client":
    """A client of an index, from the options that say where the model lies, which are taken out."""
    from .client import Client

    if with_model or any(q.row is None for q in queries):
        _quiet_libraries()
    return Client(index, **{name: options.pop(name) for name in ("model", "device", "trust_remote_code", "task")})


def _queries(file: str | None, options: dict[str, Any]) -> list["Query"]:
    """The queries of a file, or the one that the options ask, which are taken out."""
    from .query.answers import Query

    given = {name: options.pop(name) for name in ("prompt", "completion", "text", "messages", "row", "against", "span")}
    if file is None:
        if options["mean"]:
            raise UsageError("--mean is over the queries of a file; give it with --file")
        return [Query(**given | _chat(given["messages"]))]
    if any(given.values()):
        raise UsageError(
            "--file brings its own queries; give it without --prompt, --completion, --text, --messages, --row, --against and --span"
        )
    return list(_read_queries(file))


def _chat(file: str | None) -> dict[str, Any]:
    """The messages, and perhaps tools, of a JSON file."""
    if file is None:
        return {}
    from .store.corpus import read_chat

    return read_chat(file)


@main.command()
@click.argument("index")
@_json_option
def info(index: str, as_json: bool) -> None:
    """Say what an index holds: model, rows, layers, curvature, bytes.

    \b
      wherefrom info my.wherefrom
      wherefrom info my.wherefrom --json
    """
    from .store.index import Index

    summary = Index(index).summary()
    if as_json:
        _print_json(summary)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)

    def row(name: str, value: object) -> None:
        table.add_row(name.replace("_", " "), Text(printable_line(f"{value:,}" if isinstance(value, int) else str(value))))

    for name, value in summary.items():
        if name == "added":
            row("added", "; ".join(f"{part['rows']:,} rows (drift: {_drifts(part['drift'])})" for part in value) or "nothing")
        elif name == "tracked":
            for number, part in enumerate(value):
                row("measured", _tracked(part) if len(value) == 1 else f"{_tracked(part)} (model {number + 1})")
        elif name == "notes":
            for note in value:
                row("note", note)
        elif name == "unread":
            row("not read", _unread(value["files"], value["first"]) or "nothing")
        elif name == "left_out_columns":
            row("left out columns", ", ".join(f"{column} ({kind})" for column, kind in value.items()) or "nothing")
        elif name == "models":
            for model in value:
                row("model", f"{model['id']}, {model['architecture']}, {model['parameters']:,} parameters, {model['dtype']}")
        elif name != "components":
            row(name, value)
    for component in summary["components"]:
        row("", "")
        row(f"component {component['name']}", "")
        for name, value in component.items():
            if name != "name":
                row("  " + name, value)
    Console().print(table)


def _tracked(part: dict[str, Any]) -> str:
    """How much of a model an index's rows measure."""
    left_out = part["left_out"]
    some = f"; not {', '.join(left_out[:4])}{' ...' if len(left_out) > 4 else ''}" if left_out else ""
    return f"{part['parameters']:,} of {part['of']:,} parameters ({part['share']:.1%}){some}"


@main.command()
@click.argument("index")
@_json_option
def verify(index: str, as_json: bool) -> None:
    """Read every byte of an index and compare it with its checksums.

    \b
      wherefrom verify my.wherefrom && echo whole
    """
    from .store.index import Index

    checked, problems = 0, []
    for path, problem in Index(index).verify():
        checked += 1
        if problem:
            problems.append({"path": path, "problem": problem})
    if as_json:
        _print_json({"index": index, "files": checked, "whole": not problems, "problems": problems})
    else:
        for found in problems:
            _say(found["problem"])
        _say(f"{index}: {checked} files read, {len(problems) or 'none'} damaged")
    if problems:
        sys.exit(4)


@main.group()
def evaluate() -> None:
    """Ask whether an index's answers are true.

    Needs scikit-learn, scipy and bm25s (the extra `evaluation`).
    """


@evaluate.command()
@click.argument("pack")
@click.option("--model", multiple=True, help="Another model than the pack's: directory, hub id, or safetensors file; repeatable.")
@click.option("--data", help="Where an image pack's IDX files lie.  [default: in the pack, or ../../data from there]")
@click.option("--queries", default="all", show_default=True, help="all, even or odd: choose on one half, report on the other.")
@click.option("--out", help="Keep the index here.  [default: it is thrown away]")
@click.option("--scores", help="Judge this matrix [examples, queries] (.npy or .npz) instead of an index.")
@_mode_option
@_model_options
@_index_options
@_json_option
def lds(
    pack: str,
    model: tuple[str, ...],
    data: str | None,
    queries: Any,
    out: str | None,
    scores: str | None,
    mode: Any,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare scores with what retraining on half-subsets did: the linear datamodeling score, with baselines.

    \b
      wherefrom evaluate lds packs/text-a
      wherefrom evaluate lds packs/text-a --rank 64 --curvature ekfac --queries even
      wherefrom evaluate lds packs/mnist-a --data mnist/ --json
      wherefrom evaluate lds packs/text-a --scores theirs.npy

    PACK is a directory that `wherefrom pack` wrote, or one of the same layout (docs/evaluation.md). The index is built as `wherefrom build`
    does, with the options given here; the pack says how its documents were encoded.
    """
    _quiet_libraries()
    from .evaluation.judge import judge_index, judge_scores, show
    from .ray_jobs.progress import Console

    if queries not in ("all", "even", "odd"):
        raise UsageError(f"--queries is {queries!r}; it can be all, even or odd")
    place = Path(data) if data else None
    if scores is not None:
        given = click.get_current_context().get_parameter_source
        ours = {"pack", "model", "data", "queries", "scores", "device", "as_json"}
        idle = [name for name in click.get_current_context().params if name not in ours and given(name) is ParameterSource.COMMANDLINE]
        if idle:
            raise UsageError(f"--{idle[0].replace('_', '-')} means nothing beside --scores, for which no index is built")
        judgement = judge_scores(
            Path(pack), Path(scores), model=model[-1] if model else None, data=place, half=queries, device=options["device"]
        )
    else:
        options = {"model": model or None, **_as_config(options)}
        with Console() as reporter:
            judgement = judge_index(
                Path(pack), options, data=place, half=queries, mode=mode, out=Path(out) if out else None, reporter=reporter
            )
    if as_json:
        _print_json(judgement.to_dict())
    else:
        show(judgement)


@evaluate.command()
@click.argument("index")
@click.option("--file", required=True, help="Queries, as for query; - reads standard input.")
@click.option("-k", type=int, default=10, show_default=True, help="Proponents of each query, and as many random examples.")
@_mode_option
@click.option("--optimizer", default="sgd", show_default=True, help="Of the step: sgd or adam.")
@click.option("--rate", type=float, default=1e-2, show_default=True, help="The step's learning rate.")
@_moved_model_option
@_device_option
@_own_task_option
@_json_option
def tailpatch(index: str, file: str, model: tuple[str, ...], device: str, task: str | None, as_json: bool, **options: Any) -> None:
    """Take one optimizer step on each of the top proponents: does the query's loss fall?

    \b
      wherefrom evaluate tailpatch my.wherefrom --file queries.jsonl
    """
    _quiet_libraries()
    from .client import Client
    from .evaluation.checks import tailpatch as run
    from .ray_jobs.progress import Console

    with Console() as reporter:
        report = run(Client(index, model=model, device=device, task=task), list(_read_queries(file)), reporter=reporter, **options)
    _show_report(report, as_json)


@evaluate.command()
@click.argument("index")
@click.option("--train", required=True, help="Your training function, module:function (as for wherefrom pack).")
@click.option("--base", required=True, help="What it starts from: a model that has not seen the examples.")
@click.option("--file", required=True, help="Queries, as for query; - reads standard input.")
@click.option("-k", type=int, default=50, show_default=True, help="Examples to leave out.")
@click.option("--draws", type=int, default=5, show_default=True, help="Random choices to compare with.")
@_mode_option
@_moved_model_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_worker_options
@_json_option
def brittleness(index: str, train: str, base: str, file: str, as_json: bool, **options: Any) -> None:
    """Train again without the top proponents: does the query's loss rise more than without random examples?

    \b
      wherefrom evaluate brittleness my.wherefrom --train mytraining:train --base ./base --file queries.jsonl -k 50 --workers 4
    """
    _quiet_libraries()
    from .evaluation.checks import brittleness as run
    from .ray_jobs.progress import Console

    with Console() as reporter:
        report = run(index, list(_read_queries(file)), train, base, reporter=reporter, **options)
    _show_report(report, as_json)


@evaluate.command()
@click.argument("index")
@click.option("--column", required=True, help="Metadata column that is true where an example's label is known to be wrong.")
@_json_option
def labels(index: str, column: str, as_json: bool) -> None:
    """Does self-influence find the examples whose labels are wrong?

    \b
      wherefrom evaluate labels my.wherefrom --column corrupted
    """
    from .evaluation.checks import labels as run

    _show_report(run(index, column), as_json)


@evaluate.command()
@click.argument("index")
@click.argument("reference")
@click.option("--file", help="Queries, as for query.  [default: a sample of the index's rows]")
@click.option("-k", type=int, default=10, show_default=True, help="How many of the best must be found again.")
@_mode_option
@_json_option
def recall(index: str, reference: str, file: str | None, as_json: bool, **options: Any) -> None:
    """How much of a float32 index's answers does a compressed index of the same corpus give?

    \b
      wherefrom evaluate recall int8.wherefrom float32.wherefrom
    """
    _quiet_libraries()
    from .evaluation.checks import recall as run

    _show_report(run(index, reference, list(_read_queries(file)) if file else None, **options), as_json)


def _show_report(report: "Report", as_json: bool) -> None:
    from .evaluation.checks import show

    if as_json:
        _print_json(report.to_dict())
    else:
        show(report)


@main.command()
@click.option("--train", required=True, help="Your training function, module:function.")
@click.option("--model", required=True, help="Directory or hub id of the tokenizer (and of the model to start from, if you do).")
@click.option("--data", required=True, multiple=True, help="Training documents, as for build; repeatable.")
@click.option("--queries", required=True, help="Documents whose losses are measured.")
@click.option("--out", required=True, help="Directory to make.")
@click.option("--subsets", type=int, default=60, show_default=True, help="Random subsets to retrain on.")
@click.option("--fraction", type=float, default=0.5, show_default=True, help="Of the documents, in each subset.")
@click.option("--seeds", type=int, default=1, show_default=True, help="Trainings on each subset; several tell how noisy they are.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Longest example; what follows is cut off.")
@click.option("--append-eos/--no-append-eos", default=True, show_default=True, help="End each document with the end-of-text token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the subsets.")
@_worker_options
@click.option("--device", default="auto", show_default=True, help="Where queries are measured: auto, cpu, cuda or cuda:N.")
def pack(**options: Any) -> None:
    """Make ground truth for your own model: retrain on random subsets and measure.

    \b
      wherefrom pack --train mytraining:train --model ./base --data train.jsonl --queries held-out.jsonl --out mypack --workers 4
      wherefrom evaluate lds mypack

    The training function is train(examples, model, seed) -> torch.nn.Module: examples with token_ids, loss_mask and text, the --model,
    and a seed. Each training's losses are kept as soon as it ends; the same command goes on where it was.
    """
    _quiet_libraries()
    from .evaluation.retrain import PackConfig, make_pack
    from .ray_jobs.progress import Console

    with Console() as reporter:
        made = make_pack(PackConfig(**options), reporter)
    _say(f"judge an index on it:  wherefrom evaluate lds {made}")


@main.command()
@click.option("--out", default="wherefrom-demo", show_default=True, help="Directory for the model, the corpus and the index.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that build the index.")
def demo(out: str, workers: int) -> None:
    """Train a small model on a small corpus, index it, and ask three queries.

    Needs no network and leaves everything behind to play with.
    """
    _quiet_libraries()
    from .demo.run import run

    run(Path(out), workers)


def _weights(given: str | None) -> dict[str, float]:
    weights = {}
    for part in given.split(",") if given else ():
        name, _, number = part.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError as error:
            raise UsageError(f"--weights is {given!r}; it is written as head=1,blocks=0.5") from error
    return weights


def _as_config(options: dict[str, Any]) -> dict[str, Any]:
    """A build's options as the configuration has them: several values as a tuple, components split at their commas."""
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in options.items()}
    components = plain["components"] and tuple(part.strip() for part in plain["components"].split(","))
    return plain | {"components": components, "revision": plain["revision"] or None}


def _read_queries(file: str) -> Iterable["Query"]:
    from .query.answers import Query
    from .store.corpus import read_queries

    for record in read_queries(file):
        yield Query(**record)


def _quiet_libraries() -> None:
    """Keep transformers and datasets from writing their own bars and warnings among ours."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()
