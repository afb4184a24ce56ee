"""The command line: options in, library calls, results on stdout, progress and errors on stderr.

Every module is imported inside the command that needs it, so that `wherefrom --help` starts at once. Exit codes: 0 done, 1 error, 2 usage,
3 not found or incompatible, 4 integrity, 130 interrupted. An option is taken from the command line, else from the environment
(WHEREFROM_BUILD_SEED for `wherefrom build -o seed=1`), else from the file given with --config, else it has its default.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup
from click.core import ParameterSource

from .command_options import ConfigCommand, config_options, query_options, take_config_values, take_options, with_flags
from .query.options import Options, Query, ScoreOptions, option_fields
from .store.errors import UsageError, WherefromError, first_line
from .store.printable import say, to_json

if TYPE_CHECKING:
    from .client import Client
    from .query.asking import BaseClient


class _Group(cloup.Group):
    """Turns the library's errors into one sentence on stderr and their exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a character that the terminal's encoding lacks is escaped
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.Exit as signal:
            sys.exit(signal.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            say(error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else "", err=True)
            _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            say("Interrupted. What a build has finished is kept; the same command continues it.", err=True)
            sys.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            sys.exit(1)
        except WherefromError as error:
            _fail(str(error), error.exit_code)
        except OSError as error:
            _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
        except (EOFError, RuntimeError, TypeError, ValueError, AttributeError, ArithmeticError, LookupError, ImportError) as error:
            if os.environ.get("WHEREFROM_TRACEBACK"):
                raise
            _fail(_unforeseen(error), 1)
        except MemoryError:
            _fail("out of memory; use a smaller -o batch_tokens, fewer --workers or a smaller -o rank", 1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a message of the library names options as the command does."""
        try:
            return super().invoke(ctx)
        except WherefromError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            if command is not None and not isinstance(command, click.Group):
                error.args = (with_flags(str(error), command),)
            raise


def _unforeseen(error: Exception) -> str:
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    reason = first_line(error) if str(error) else "no reason given"
    return (
        f"{type(error).__name__}: {reason} (at {frame.filename}:{frame.lineno}); if that is not your own code, it is a defect of "
        "Wherefrom: WHEREFROM_TRACEBACK=1 shows where it comes from"
    )


def _fail(message: str, code: int) -> None:
    say(f"Error: {message}", err=True)
    sys.exit(code)


def _print_json(value: Any) -> None:
    """Print JSON on one line."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "")
    click.echo(to_json(value, ascii_only=encoding != "utf8"))


def _result(as_json: bool, record: Any, show: str, *shown: Any) -> None:
    """Print a result: its record as JSON, or for people by the function `show` of terminal.py, which loads rich and is slow."""
    if as_json:
        _print_json(record)
    else:
        from . import terminal

        getattr(terminal, show)(*shown)


_BUILD = cloup.Section("Build an index")
_ASK = cloup.Section("Ask it")
_ACT = cloup.Section("Act on its answers")
_JUDGE = cloup.Section("Judge its answers")
_LOOK = cloup.Section("Look and check")


@cloup.group(
    cls=_Group,
    sections=[_BUILD, _ASK, _ACT, _JUDGE, _LOOK],
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "WHEREFROM"},
)
@click.version_option(package_name="wherefrom")
def main() -> None:
    """Search a training corpus for the examples behind an output.

    Build an index of a model's training corpus once, then ask it.

    \b
      wherefrom demo                                      see it work, in a minute or two
      wherefrom build --model DIR --data FILE --out INDEX
      wherefrom query INDEX --prompt "The capital of France is" --completion " Paris"
    """
    # Threads that spin while they wait take several times as long where other programs need the cores, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


_INDEX: Callable[..., Any] = click.argument("index", type=click.Path())
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for a program to read.")
_task_option = click.option("--task", help="For an index of a custom task: its module:Class again.")
_moved_model_option = click.option(
    "--model", multiple=True, type=click.Path(), help="The model's present location, if it was moved; of several models, all in order."
)
_mode_option = click.option(
    "--mode", type=click.Choice(option_fields(ScoreOptions)["mode"].choices), default="influence", show_default=True
)
_BUILD_HAS = ("damping", "curvature", "weights", "layers", "preset")  # options of a build, with which an index is made to be judged
_device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, map or tp.")
_training_device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
_queries_option = click.option("--file", type=click.Path(), required=True, help="JSON lines of queries; - reads standard input.")
_local_option = click.option("--local", is_flag=True, help="Answer in this process even if a server runs.")


def _together(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Combine decorators to one, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_model_options = cloup.option_group(
    "Model",
    _moved_model_option,
    _device_option,
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    _task_option,
)
_worker_options = cloup.option_group(
    "Workers",
    click.option("--workers", type=int, default=1, show_default=True, help="Processes, started by Ray; 1 stays in this one."),
    click.option("--threads", type=int, default=1, show_default=True, help="Threads of each worker."),
    click.option("--address", help="Address of a Ray cluster.  [default: a local Ray]"),
)


@main.command(cls=ConfigCommand, section=_BUILD)
@config_options
@_json_option
def build(as_json: bool, **values: Any) -> None:
    """Index a corpus.

    \b
      wherefrom build --model gpt2 --data corpus.jsonl --out my.wherefrom
      wherefrom build --model gpt2 --data corpus.jsonl --out big.wherefrom --bytes-per-example 2400
      wherefrom build --model run/checkpoint-500 --model run/checkpoint-1000 --data corpus.jsonl --out run.wherefrom
      wherefrom build --model ./sft --data chats.parquet --out sft.wherefrom -o seed=1 --workers 4
      wherefrom build --model ./lm --data books/ --out b.wherefrom -o row_dtype=int8 --layers '*.mlp.*'

    A build that was interrupted continues when the same command is given again.
    """
    options = take_config_values(values)
    _quiet_libraries()
    from .ray_jobs.build import build as run
    from .ray_jobs.config import BuildConfig
    from .ray_jobs.progress import Console
    from .store.index import Index
    from .store.manifest import latest_manifest

    config = BuildConfig(**options)
    existed = latest_manifest(_place(config.out)) is not None
    with Console() as reporter:
        run(config, reporter)
    index = Index(config.out)
    _result(as_json, index.summary(), "show_built", index, existed)


@main.command(cls=ConfigCommand, section=_LOOK, without=("out",))
@config_options
@_json_option
def plan(as_json: bool, **values: Any) -> None:
    """Estimate the cost of a build: rows, bytes, memory and time, from a sample and a few measured batches.

    \b
      wherefrom plan --model gpt2 --data corpus.jsonl --bytes-per-example 2400
      wherefrom plan --model ./sft --data chats.parquet -o seed=1 --workers 4 --json
    """
    options = take_config_values(values)
    _quiet_libraries()
    from .ray_jobs.config import BuildConfig
    from .ray_jobs.plan import estimate
    from .ray_jobs.progress import Console

    with Console() as reporter:
        cost = estimate(BuildConfig(out="(nothing)", **options), reporter)
    _result(as_json, asdict(cost), "show_cost", cost)


@main.command(section=_BUILD)
@_INDEX
@click.option("--data", type=click.Path(), required=True, multiple=True, help="Documents to add, as for build; repeatable.")
@_model_options
@_worker_options
@click.option("--batch-tokens", type=int, help="Padded tokens in a batch.  [default: the build's]")
@_json_option
def add(index: str, data: tuple[str, ...], model: tuple[str, ...], task: str | None, as_json: bool, **runtime: Any) -> None:
    """Add documents to an index, with the encoder that it has.

    \b
      wherefrom add my.wherefrom --data more.jsonl
      wherefrom add my.wherefrom --data 2026/ --workers 4

    The columns are those that the index was built with. The drift of each component is printed: how much longer rows are on average than
    those of the build (1: alike). Where it is far from 1 the curvature no longer fits, and the index should be built again.
    """
    _quiet_libraries()
    from .ray_jobs.add import add as run
    from .ray_jobs.add import drifted
    from .ray_jobs.progress import Console
    from .store.manifest import latest_manifest

    before = latest_manifest(_place(index))
    with Console() as reporter:
        manifest = run(_place(index), data, runtime, model, reporter, task)
    existed = latest_manifest(_place(index)) == before
    addition = manifest.build.added[-1]
    refit = drifted(addition.drift)
    record = addition.model_dump(mode="json", include={"rows", "drift", "unread", "left_out_columns"})
    _result(as_json, {**record, "refit": refit}, "show_added", index, manifest, refit, existed)


@main.command(section=_BUILD)
@_INDEX
@click.option("--ids", type=click.Path(), help="File with an id a line, as text or JSON, of examples or of documents; - is standard input.")
@click.option("--where", help="Delete the rows that match, such as 'source == \"web\"'.")
@_json_option
def delete(index: str, ids: str | None, where: str | None, as_json: bool) -> None:
    """Delete examples from all answers, at once; wherefrom compact reclaims their storage.

    \b
      wherefrom delete my.wherefrom --ids removed.txt
      wherefrom delete my.wherefrom --where 'source == "web" and year < 2010'

    Lines of a list end at a newline; empty ones are skipped. A line that begins with a quotation mark or a brace is JSON: a text, or an
    object with an id, as in the explorer's removal list and in answers saved as JSON lines. Any other line is the id itself.
    """
    from .store.corpus import read_ids
    from .store.update import delete as run

    if (ids is None) == (where is None):
        raise UsageError("name what is to be deleted: --ids FILE or --where FILTER, one of them")
    deleted = run(_place(index), [] if ids is None else read_ids(ids), where)
    if as_json:
        _print_json({"deleted": deleted})
    else:
        say(f"{deleted:,} rows were deleted from {index}")


@main.command(section=_BUILD)
@_INDEX
@click.option("--ids", type=click.Path(), required=True, help="File with an id a line, as for delete; - is standard input.")
@_json_option
def takedown(index: str, ids: str, as_json: bool) -> None:
    """Take examples out of an index for good, and search all of its bytes for what is left of them.

    \b
      wherefrom takedown my.wherefrom --ids removed.txt

    The examples are deleted, shards are written again without them, and older states, caches and FAISS indexes are removed. Then every
    file is searched for their ids, texts, metadata, tokens and codes. What other examples hold too is named. Processes that have the index
    open keep its old files until they end. The model, and statistics of many examples together, still hold what they learned.
    """
    from .store.corpus import read_ids
    from .store.takedown import takedown as run

    report = run(_place(index), read_ids(ids))
    _result(as_json, report.to_dict(), "show_takedown", report)
    if not report.is_proven:
        sys.exit(4)


@main.command(section=_BUILD)
@_INDEX
@click.option("--prune", is_flag=True, help="Also remove the files of older states; processes that read these lose them.")
@_json_option
def compact(index: str, prune: bool, as_json: bool) -> None:
    """Write shards with deleted rows again without them; rows behind them move up.

    \b
      wherefrom compact my.wherefrom --prune
    """
    from .store.update import compact as run
    from .store.update import prune as run_prune

    dropped = run(_place(index))
    freed = run_prune(_place(index)) if prune else 0
    if as_json:
        _print_json({"dropped": dropped, "freed_bytes": freed})
    else:
        say(f"{dropped:,} rows were dropped from {index}" + (f", {freed:,} bytes given back" if prune else ""))


@main.command(section=_BUILD)
@_INDEX
@click.option("--examples", type=click.IntRange(1), default=2000, show_default=True, help="Examples of the index to fit on, at most.")
@click.option("--damping", type=float, help="Relative to each layer's mean eigenvalue.  [default: 0.1; 1 without tokens]")
@_model_options
@_worker_options
@click.option("--batch-tokens", type=int, help="Padded tokens in a batch.  [default: the build's]")
@_json_option
def fit(index: str, examples: int, damping: float | None, model: tuple[str, ...], task: str | None, as_json: bool, **runtime: Any) -> None:
    """Fit EK-FAC of all layers, without projection, for reranking.

    \b
      wherefrom fit my.wherefrom
      wherefrom query my.wherefrom --text "..." --rerank 100

    Without it, --rerank computes the rows again that the index codes. With it, the candidates' whole gradients are compared. The
    factors take about as many bytes as the model's weights, in the folder rerank/ of the index. Two passes over the examples.
    """
    _quiet_libraries()
    from .ray_jobs.progress import Console
    from .ray_jobs.rerank import fit_rerank

    with Console() as reporter:
        record = fit_rerank(_place(index), examples, damping, runtime, model, reporter, task)
    dense = record.dense
    fitted = {"layers": len(dense.layers), "parameters": dense.dim, "examples": dense.curvature.examples, "bytes": record.file.bytes}
    if as_json:
        _print_json(fitted)
    else:
        say(
            f"{index}: EK-FAC of {fitted['layers']:,} layers with {fitted['parameters']:,} parameters, fitted on {fitted['examples']:,} "
            f"examples ({fitted['bytes']:,} bytes); query --rerank uses it"
        )


@main.command(section=_BUILD)
@_INDEX
@click.option("--faiss", metavar="FACTORY", help="Also make a FAISS index of dense rows, such as HNSW32 or IVF4096_HNSW32,RaBitQ.")
@click.option("--faiss-parameters", default="", help="Of its searches, such as nprobe=64 or efSearch=128.")
@click.option("--component", help="The dense component, where there are several.")
@_json_option
def reindex(index: str, faiss: str | None, faiss_parameters: str, component: str | None, as_json: bool) -> None:
    """Recompute posting lists and scan codes, and write those that are missing, damaged or not of the rows.

    \b
      wherefrom reindex my.wherefrom
      wherefrom reindex dense.wherefrom --faiss IVF4096_HNSW32,SQ8 --faiss-parameters nprobe=64

    With --faiss, query --engine faiss finds candidates by a FAISS index of the rows. Its recall is measured when it is made, on rows that
    it was not trained on, and stands with every answer.
    """
    from .store.index import changing

    if faiss is None and (faiss_parameters or component):
        raise UsageError("--faiss-parameters and --component are of a FAISS index; give them with --faiss")
    record = None
    with changing(_place(index)) as opened:
        written = opened.reindex(compare=True)
        if faiss is not None:
            from .query.faiss_index import make_faiss
            from .ray_jobs.progress import Console

            with Console() as reporter:
                record = make_faiss(opened, faiss, faiss_parameters, component, reporter)
    if as_json:
        _print_json({"index": index, "written": written, "faiss": record and record.model_dump(mode="json")})
        return
    if record is not None:
        shares = f"{record.proponents:.1%} of the best and {record.opponents:.1%} of the worst {record.k} rows"
        say(f"a FAISS index {record.factory} of {record.rows:,} rows was made ({record.file.bytes:,} bytes)")
        say(f"it finds {shares} for {record.queries:,} held-out rows")
    say(f"{written:,} sets of posting lists and one-bit codes were made" if written else "all there, and of these rows")


@main.command(section=_ASK)
@click.argument("indexes", nargs=-1, required=True, metavar="INDEX...", type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than loopback need a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8787, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option("--token-file", type=click.Path(), help="File with a token that every request must have.")
@click.option("--grants", type=click.Path(), help="File with a grant a line: a token, and a filter of the rows that its holder may read.")
@click.option("--audit", type=click.Path(), help="File to which every request is appended, as JSON lines.")
@click.option("--batch", type=click.IntRange(1, 256), default=16, show_default=True, help="Queries answered in one pass, at most.")
@cloup.option_group(
    "Ray",
    click.option("--ray", "on_ray", is_flag=True, help="Search the rows in Ray actors, on one or several machines."),
    click.option("--address", help="Address of a Ray cluster.  [default: a local Ray]"),
    click.option("--parts", type=click.IntRange(1, 1024), help="Parts of each index.  [default: one for each node]"),
    click.option("--replicas", type=click.IntRange(1, 1024), default=1, show_default=True, help="Actors of each part."),
    click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="Threads, and CPUs, of each actor."),
)
@_model_options
def serve(
    indexes: tuple[str, ...],
    host: str,
    port: int,
    token_file: str | None,
    grants: str | None,
    audit: str | None,
    batch: int,
    on_ray: bool,
    address: str | None,
    parts: int | None,
    replicas: int,
    threads: int,
    **model: Any,
) -> None:
    """Answer queries over HTTP, and in a browser: models and indexes are loaded once.

    \b
      wherefrom serve my.wherefrom                       then open http://127.0.0.1:8787
      wherefrom serve base=a.wherefrom sft=b.wherefrom --port 9000
      wherefrom serve my.wherefrom --host 0.0.0.0 --token-file token.txt
      wherefrom serve my.wherefrom --host 0.0.0.0 --grants grants.jsonl --audit audit.jsonl
      wherefrom serve my.wherefrom --ray --address 10.0.0.1:6379 --parts 8 --replicas 2 --threads 16

    While it runs, wherefrom query asks it and starts at once. An index that changes is picked up without a restart. The interface is
    described at /docs.

    A line of --grants is {"name": "ann", "token": "...", "where": "license == 'open'"}: with that token, only matching rows are in answers,
    scores, groups and explanations, or can be read by number.

    With --ray, every part of an index has --replicas actors, which are started again elsewhere when they die, and the answers are the
    same. Every machine reads the index at the same path. SIGHUP replaces the actors one after the other.
    """
    _quiet_libraries()
    from .client import Client
    from .server.access import Audit, read_tokens
    from .server.run import name_indexes
    from .server.run import serve as run

    tokens = read_tokens(token_file, grants)
    log = None if audit is None else Audit(Path(audit))
    named = name_indexes(list(indexes))
    if not on_ray:
        source = click.get_current_context().get_parameter_source
        idle = [name for name in ("address", "parts", "replicas", "threads") if source(name) is ParameterSource.COMMANDLINE]
        if idle:
            raise UsageError(f"--{idle[0]} is for actors of Ray; give it with --ray")
        clients = {name: Client(path, **model) for name, path in named.items()}
        for client in clients.values():
            client.prepare()
        run(clients, host, port, tokens, log, batch)
        return
    from .ray_jobs.fleet import close, open_fleets

    with open_fleets(list(named.values()), address, parts, replicas, threads) as fleets:
        clients = {name: Client(fleet_parts.index, parts=fleet_parts, **model) for name, fleet_parts in zip(named, fleets, strict=True)}
        for client in clients.values():
            client.prepare()

        def restart() -> None:
            for fleet_parts in fleets:
                fleet_parts.fleet.restart()

        run(clients, host, port, tokens, log, batch, restart, partial(close, fleets))


_answer_options = _together(
    query_options("Answer", Options, without=tuple(ScoreOptions.__annotations__)), query_options("Scores", ScoreOptions)
)


@main.command(section=_ASK)
@_INDEX
@query_options("Query", Query)
@click.option("--file", type=click.Path(), help="JSON lines of queries instead of one; - reads standard input.")
@_answer_options
@click.option("--no-rerank", is_flag=True, help="The same as --rerank 0: faster, and in the order of stored rows.")
@_model_options
@_local_option
@_json_option
def query(index: str, file: str | None, no_rerank: bool, as_json: bool, **values: Any) -> None:
    """Find the training examples that made the model say this.

    \b
      wherefrom query my.wherefrom --prompt "The capital of France is" --completion " Paris" --against " Lyon"
      wherefrom query my.wherefrom --text "Once upon a time" -k 5 --mode cosine
      wherefrom query my.wherefrom --row 123 --no-opponents --where 'source != "wiki" and not title == None'
      wherefrom query my.wherefrom --file queries.jsonl --mean --group-by source
      wherefrom query my.wherefrom --file queries.jsonl --json > answers.jsonl

    A filter compares columns (id, document, chunk, text, source and the corpus's own) with values: ==, !=, <, <=, >, >=, in, and, or, not,
    and text columns' .startswith("..."), .endswith and .contains. Dates and times are written as ISO text, durations in seconds.

    A running server (wherefrom serve) that has the index is asked, unless --local is given; the answer is the same. WHEREFROM_URL names one
    on another machine, WHEREFROM_TOKEN its token.

    With --recall 0.99, one-bit codes determine which dense rows are read, and with probability 0.99 none of the best is missing; where too
    many would have to be read, or there are no codes (wherefrom reindex), all are, and the answer says so.
    """
    queries = _queries(file, values)
    options = take_options(values, Options)
    if no_rerank:
        if options.get("rerank"):
            raise UsageError("--rerank and --no-rerank are opposites; give one of them")
        options["rerank"] = 0
    client = _client(index, values, queries)
    for answer in client.query_many(queries, **options):
        _result(as_json, answer.to_dict(), "show_answer", answer)


@main.command(section=_ASK)
@_INDEX
@click.option("--example", "examples", type=int, multiple=True, help="Row of a training example; repeatable.  [default: the best 3]")
@query_options("Query", Query)
@click.option("--tokens/--no-tokens", default=True, show_default=True, help="Shares by token; they need the model.")
@query_options("Scores", ScoreOptions)
@_model_options
@_local_option
@_json_option
def explain(index: str, examples: tuple[int, ...], tokens: bool, as_json: bool, **values: Any) -> None:
    """Split the score of a training example by component, layer, shared token, and token of either text.

    \b
      wherefrom explain my.wherefrom --prompt "The capital of France is" --completion " Paris"
      wherefrom explain my.wherefrom --example 123 --prompt "The capital of France is" --completion " Paris" --json
      wherefrom explain my.wherefrom --example 123 --row 456 --no-tokens

    Components, layers and shared tokens are read from the rows, and add up to the score. Shares by token are computed with the model.
    """
    (query,) = _queries(None, values)
    options = take_options(values, ScoreOptions)
    client = _client(index, values, [query], with_model=tokens)
    if not examples:
        examples = tuple(proponent.row for proponent in client.query(query, **options).proponents[:3])
    for explanation in client.explain(examples, query, tokens=tokens, **options):
        _result(as_json, explanation.to_dict(), "show_explanation", explanation)


@main.command(section=_ACT)
@_INDEX
@click.option("--for", "targets", type=click.Path(), required=True, help="JSON lines of targets: queries whose loss should fall.")
@click.option("--budget", type=click.IntRange(1), required=True, help="Examples to choose, at most.")
@click.option("--method", type=click.Choice(["sum", "max", "cover"]), default="cover", show_default=True, help="How targets count.")
@click.option(
    "--by",
    type=click.Choice(["cosine", "influence", "loss-normalized", "bm25", "random"]),
    default="cosine",
    show_default=True,
    help="What examples are compared by.",
)
@click.option("--at-most", metavar="COLUMN=N", help="At most so many examples of each value of a column, such as source=50.")
@click.option("--distinct", type=float, help="No two chosen rows have a cosine above this.")
@click.option("--where", help="Choose only rows that match a filter.")
@click.option("--out", type=click.Path(), help="Write the chosen examples as JSON lines, with their texts, to train on.")
@_model_options
@_json_option
def select(index: str, targets: str, at_most: str | None, distinct: float | None, out: str | None, as_json: bool, **values: Any) -> None:
    """Choose training examples for targets, within a budget.

    \b
      wherefrom select my.wherefrom --for targets.jsonl --budget 200 --out chosen.jsonl
      wherefrom select my.wherefrom --for targets.jsonl --budget 200 --at-most source=50 --distinct 0.9
      wherefrom select my.wherefrom --for targets.jsonl --budget 200 --by bm25 --out by-words.jsonl

    cover chooses so that every target has an example (facility location), sum by the mean score over targets, max by the highest for any.
    """
    from .query.results import refuse_existing, write_lines
    from .query.select import Limits

    column, _, number = (at_most or "").rpartition("=")
    if at_most is not None and not (column and number.isascii() and number.isdigit() and len(number) < 16):
        raise UsageError(f"--at-most is {at_most!r}; write it as COLUMN=N, such as source=50")
    limits = Limits(column or None, int(number) if column else None, distinct)
    if out is not None:
        refuse_existing(Path(out))
    queries = list(_read_queries(targets))
    model = {name: values.pop(name) for name in ("model", "device", "trust_remote_code", "task")}
    client = _local_client(index, model, queries)
    selection = client.select(queries, limits=limits, **values)
    if out is not None:
        write_lines(Path(out), selection.to_dict()["examples"])
    _result(as_json, selection.to_dict(), "show_selection", selection, out)


@main.command(section=_JUDGE)
@_INDEX
@click.option(
    "--queries", type=click.Path(), required=True, help="JSON lines of queries, each with a group, and perhaps answers and steps."
)
@click.option(
    "--mode",
    type=click.Choice(option_fields(ScoreOptions)["mode"].choices),
    default="loss-normalized",
    show_default=True,
    help="Of scores.",
)
@click.option("--column", default="source", show_default=True, help="Whose values are over- or under-represented.")
@click.option("--out", type=click.Path(), help="Name of the report: OUT.json and OUT.html.")
@_model_options
@_json_option
def study(index: str, queries: str, mode: Any, column: str, out: str | None, as_json: bool, **model: Any) -> None:
    """Tell groups of queries apart: do they draw on the same examples, on many or few, and on which sources?

    \b
      wherefrom study my.wherefrom --queries groups.jsonl --out study

    A line of the file is a query with a group, such as {"prompt": "3 + 4 =", "completion": " 7", "group": "sums", "answers": ["= 7"]}.
    """
    _quiet_libraries()
    from .evaluation.study import read_study
    from .evaluation.study import study as run
    from .ray_jobs.progress import Console

    with Console() as reporter:
        report = run(index, read_study(queries), mode=mode, column=column, out=out, reporter=reporter, **model)
    _result(as_json, report.to_dict(), "show_study", report, out)


@main.command(section=_ACT)
@_INDEX
@click.option("-k", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Examples of each kind.")
@click.option("--similar", type=float, default=0.95, show_default=True, help="Cosine above which rows are near-duplicates.")
@click.option("--where", help="Look only at rows that match a filter.")
@_json_option
def outliers(index: str, k: int, similar: float, where: str | None, as_json: bool) -> None:
    """Find training examples to look at: the most self-influential, doubtful labels, near-duplicates. Needs no model.

    \b
      wherefrom outliers my.wherefrom
      wherefrom outliers my.wherefrom --where 'source == "web"' -k 100 --json > outliers.json
    """
    from .query.outliers import find_outliers
    from .ray_jobs.progress import Console
    from .store.index import Index

    with Console() as reporter:
        found = find_outliers(Index(_place(index)), reporter, k=k, similar=similar, where=where)
    _result(as_json, found.to_dict(), "show_outliers", found)


@main.command(section=_ACT)
@_INDEX
@click.option("--file", type=click.Path(), help="JSON lines of queries whose best proponents are listed.")
@click.option("--top", type=click.IntRange(1), default=50, show_default=True, help="Examples in all, of all queries.")
@click.option("--opponents", is_flag=True, help="List the worst opponents instead.")
@click.option("--outliers", "from_outliers", is_flag=True, help="List doubtful labels and near-duplicates (wherefrom outliers).")
@click.option("--ids", type=click.Path(), help="List these ids, chosen by hand, as for delete; - is standard input.")
@click.option("--reason", default="chosen by hand", show_default=True, help="Of the ids that were chosen by hand.")
@click.option("--out", type=click.Path(), required=True, help="The removal list, JSON lines.")
@query_options("Scores", ScoreOptions)
@_model_options
@_json_option
def removal(
    index: str,
    file: str | None,
    top: int,
    opponents: bool,
    from_outliers: bool,
    ids: str | None,
    reason: str,
    out: str,
    as_json: bool,
    **values: Any,
) -> None:
    """Write a removal list: examples with the reasons why, for delete, takedown and act.

    \b
      wherefrom removal my.wherefrom --file poisoned.jsonl --top 50 --out removed.jsonl
      wherefrom removal my.wherefrom --outliers --out duplicates.jsonl
      wherefrom removal my.wherefrom --ids mine.txt --reason 'wrong licence' --out removed.jsonl
    """
    from .query import removal as lists
    from .ray_jobs.progress import Console
    from .store.corpus import read_ids
    from .store.index import Index

    if [file is not None, from_outliers, ids is not None].count(True) != 1:
        raise UsageError("name what is to be removed: --file of queries, --outliers, or --ids; one of them")
    opened = Index(_place(index))
    if file is not None:
        queries = list(_read_queries(file))
        options: Any = take_options(values, ScoreOptions)
        answers = _local_client(index, values, queries).query_many(queries, **options, k=min(top, len(opened)))
        chosen = lists.of_answers(answers, top, opponents)
    elif from_outliers:
        from .query.outliers import find_outliers, reasons

        with Console() as reporter:
            found = find_outliers(opened, reporter, k=top)
        chosen = [lists.Removal(id, why, {}) for id, why in reasons(found).items()][:top]
    else:
        chosen = lists.of_ids(read_ids(str(ids)), reason)
    rows = lists.write_removal(opened, chosen, Path(out))
    if as_json:
        _print_json({"out": out, "rows": rows})
    else:
        say(f"{out} names {rows:,} rows; try it:  wherefrom act {index} --remove {out} ...  or:  wherefrom delete {index} --ids {out}")


@main.command(section=_ACT)
@_INDEX
@click.option("--remove", type=click.Path(), required=True, help="Removal list, or a file with an id a line.")
@click.option("--train", required=True, help="Your training function, module:function (as for wherefrom pack).")
@click.option("--base", type=click.Path(), required=True, help="The model that training starts from, which has not seen the examples.")
@_queries_option
@click.option("--held-out", type=click.Path(), help="JSON lines of queries that should not change.")
@click.option("--draws", type=click.IntRange(1), default=3, show_default=True, help="Random choices to compare with.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Trainings with each choice.")
@click.option("--out", type=click.Path(), required=True, help="Name of the report: OUT.json and OUT.html.")
@click.option("--key", type=click.Path(), help="Private Ed25519 key (PEM) that signs the report; wherefrom verify checks it.")
@_moved_model_option
@_training_device_option
@_worker_options
@_json_option
def act(index: str, remove: str, file: str, held_out: str | None, as_json: bool, **options: Any) -> None:
    """Train again without some examples, and compare what the index predicted with what happened.

    \b
      wherefrom act my.wherefrom --remove removed.jsonl --train mytraining:train --base ./base --file queries.jsonl \\
        --held-out others.jsonl --out report --key key.pem
    """
    _quiet_libraries()
    from .evaluation.act import act as run
    from .ray_jobs.progress import Console
    from .store.corpus import read_ids

    others = list(_read_queries(held_out)) if held_out else []
    with Console() as reporter:
        report = run(index, read_ids(remove), list(_read_queries(file)), held_out=others, reporter=reporter, **options)
    _result(as_json, report.to_dict(), "show_act", report, options["out"])


@main.command(section=_ASK)
@_INDEX
@_queries_option
@click.option("--out", type=click.Path(), required=True, help="Name of the result: scores.zarr or scores.parquet.")
@click.option("--recompute", is_flag=True, help="Compute all rows again with the model, as query --rerank does for the best.")
@query_options("Scores", ScoreOptions)
@_model_options
@_json_option
def scores(index: str, file: str, out: str, recompute: bool, as_json: bool, **values: Any) -> None:
    """Write every row's score for every query: a matrix.

    \b
      wherefrom scores my.wherefrom --file queries.jsonl --out scores.zarr
      wherefrom scores my.wherefrom --file queries.jsonl --out scores.parquet --mode cosine

    Zarr: an array scores [queries, rows] and ids of rows and queries. Parquet: a line for each row, with its id and a column for
    each query. Deleted rows have no score (NaN). --recompute takes a pass over the corpus.
    """
    from .query.matrix import write_scores
    from .ray_jobs.progress import Console
    from .store.presets import mixes

    queries = list(_read_queries(file))
    options = take_options(values, ScoreOptions)
    client = _local_client(index, values, queries, with_model=recompute)
    blocks = client.recomputed_blocks if recompute else client.score_blocks
    if mixes(options) and not recompute:
        blocks = partial(client.score_blocks, mixings=client.mixings(queries, **options))
    with Console() as reporter:
        shape = write_scores(client.index, lambda part: blocks(part, **options), queries, Path(out), reporter)
    if as_json:
        _print_json({"out": out, "queries": shape[0], "rows": shape[1]})
    else:
        say(f"{out} holds the scores of {shape[1]:,} rows for {shape[0]:,} queries")


@main.command(section=_ASK)
@_INDEX
@_queries_option
@click.option("--out", type=click.Path(), required=True, help="Name of the result, queries.npz.")
@query_options("Scores", ScoreOptions, without=("mode",))
@_model_options
@_json_option
def encode(index: str, file: str, out: str, as_json: bool, **values: Any) -> None:
    """Write queries as vectors, for the rows that wherefrom export writes.

    \b
      wherefrom encode my.wherefrom --file queries.jsonl --out queries.npz
      wherefrom encode my.wherefrom --file queries.jsonl --out queries.npz --damping 1 --layers 'h.0.*'

    The inner product of a query's vector with a row's is the row's score, with damping, layers and weights in the query.
    """
    from .query.export import export_queries

    queries = list(_read_queries(file))
    options = take_options(values, ScoreOptions)
    client = _local_client(index, values, queries)
    written = export_queries(client.scorer(queries, **options), Path(out), [query.id or str(i) for i, query in enumerate(queries)])
    if as_json:
        _print_json(written)
    else:
        say(f"{out} holds {written['queries']:,} queries")


@main.command(section=_ASK)
@_INDEX
@click.argument("format", metavar="FORMAT", type=click.Choice(["numpy", "parquet", "faiss"]))
@click.option("--out", type=click.Path(), required=True, help="Directory to make.")
@click.option("--component", help="The component, where there are several.")
@click.option("--factory", default="Flat", show_default=True, help="Of the FAISS index.")
@_json_option
def export(index: str, format: Any, out: str, component: str | None, factory: str, as_json: bool) -> None:
    """Write the rows of a component for a search engine of your own: as numpy, parquet or faiss.

    \b
      wherefrom export dense.wherefrom numpy --out rows
      wherefrom export dense.wherefrom faiss --out rows --factory HNSW32
      wherefrom export my.wherefrom parquet --component head --out head

    Deleted rows are left out; rows.npy has the rows' numbers in the index, and ids.txt their ids. wherefrom encode writes queries.
    """
    from .query.export import export_rows
    from .ray_jobs.progress import Console
    from .store.index import Index

    with Console() as reporter:
        about = export_rows(Index(index), Path(out), format, component, factory, reporter)
    if as_json:
        _print_json(about)
    else:
        say(f"{out} holds {about['rows']:,} rows of {about['component']}")


@main.command(section=_ASK)
@click.argument("run", type=click.Path())
@_queries_option
@click.option(
    "--out", type=click.Path(), help="Also write all scores: scores.zarr or scores.parquet; an interrupted replay then continues."
)
@click.option("-k", type=click.IntRange(1, 1000), default=3, show_default=True, help="Examples to show of each sign, for each query.")
@_training_device_option
@_worker_options
@_json_option
def replay(run: str, file: str, out: str | None, k: int, as_json: bool, **options: Any) -> None:
    """Compute exact influence through a recorded training run.

    \b
      wherefrom replay out/wherefrom-run --file queries.jsonl --out scores.zarr

    The run is repeated step by step, and each query's loss is differentiated through all of it, with respect to the weight of every
    training example. That costs a few trainings, and two more for each query. WherefromCallback(record=True) records a run
    of transformers' Trainer, wherefrom.TrainingRecorder one of your own loop.
    """
    _quiet_libraries()
    from .evaluation.replay import replay as run_replay
    from .ray_jobs.progress import Console

    with Console() as reporter:
        replayed = run_replay(run, list(_read_queries(file)), out, reporter=reporter, **options)
    _result(as_json, replayed.to_dict(k), "show_replayed", replayed, k)


def _place(path: str) -> Path:
    """A local path, or one in an object store."""
    from .store.objects import local_or_store

    return local_or_store(path)


def _client(index: str, values: dict[str, Any], queries: Sequence[Query], with_model: bool = False) -> "BaseClient":
    """A client of a running server, where no option names the model, else of the index directory."""
    model = {name: values.pop(name) for name in ("model", "device", "trust_remote_code", "task")}
    local = values.pop("local")
    if not local and model == {"model": (), "device": "auto", "trust_remote_code": False, "task": None}:
        from .remote import find_server

        server = find_server(index)
        if server is not None:
            return server
    return _local_client(index, model, queries, with_model)


def _local_client(index: str, model: dict[str, Any], queries: Sequence[Query], with_model: bool = False) -> "Client":
    from .client import Client

    if with_model or any(query.row is None for query in queries):
        _quiet_libraries()
    return Client(index, **model)


def _queries(file: str | None, values: dict[str, Any]) -> list[Query]:
    """The queries of a file, or the one that the options give."""
    fields = take_options(values, Query)
    if file is None:
        if values.get("mean"):
            raise UsageError("--mean is over the queries of a file; give it with --file")
        if "messages" in fields:
            from .query.files import read_chat

            fields |= read_chat(fields["messages"])
        if "image" in fields:
            fields["image"] = Path(fields["image"])
        return [Query(**fields)]
    if any(fields.values()):
        raise UsageError(f"--file has its own queries; give it without --{min(fields)}")
    return list(_read_queries(file))


def _read_queries(file: str) -> Iterable[Query]:
    from .query.files import read_queries

    return read_queries(file)


@main.command(section=_LOOK)
@_INDEX
@_json_option
def info(index: str, as_json: bool) -> None:
    """Describe an index: model, rows, layers, curvature, bytes.

    \b
      wherefrom info my.wherefrom
      wherefrom info my.wherefrom --json
    """
    from .store.index import Index
    from .store.rerank import read_record

    opened = Index(index)
    record = read_record(opened)
    rerank = None if record is None else {**record.dense.describe(), "bytes": record.file.bytes}
    summary = {**opened.summary(), "rerank": rerank}
    _result(as_json, summary, "show_summary", summary)


@main.command(section=_LOOK)
@_INDEX
@click.option("--signed-by", metavar="KEY", help="Public key (base64) that a report must be signed with.  [default: any]")
@_json_option
def verify(index: str, signed_by: str | None, as_json: bool) -> None:
    """Read every byte of an index and compare it with its checksums; or check the signature of a report.

    \b
      wherefrom verify my.wherefrom && echo whole
      wherefrom verify report.html --signed-by 'wMfdKq4b...='
    """
    if Path(index).suffix in (".json", ".html"):
        from .evaluation.pages import verify_report

        key = verify_report(Path(index), signed_by)
        if as_json:
            _print_json({"report": index, "whole": True, "public_key": key})
        else:
            say(f"{index} is as it was signed with the key {key}")
        return
    from .query.faiss_index import faiss_problems
    from .store.index import Index
    from .store.rerank import rerank_problems
    from .store.usual import usual_problems

    opened = Index(index)
    checked = [*opened.verify(), *rerank_problems(opened), *faiss_problems(opened), *usual_problems(opened)]
    problems = [{"path": path, "problem": problem} for path, problem in checked if problem]
    if as_json:
        _print_json({"index": index, "files": len(checked), "whole": not problems, "problems": problems})
    else:
        for problem in problems:
            say(problem["problem"])
        say(f"{index}: {len(checked)} files read, {len(problems) or 'none'} damaged")
    if problems:
        sys.exit(4)


@main.group(section=_JUDGE, cls=_Group)
def evaluate() -> None:
    """Check whether an index's answers are true.

    Needs the extra `evaluation` (pip install 'wherefrom[evaluation]').
    """


@evaluate.command(cls=ConfigCommand, without=("out", "model", "data", "fields", "max_tokens"))
@click.argument("pack", type=click.Path())
@click.option("--model", multiple=True, type=click.Path(), help="Another model than the pack's: directory, hub id, or safetensors file.")
@click.option("--index", type=click.Path(), help="Judge this index of the pack's training documents instead of building one.")
@click.option("--data", type=click.Path(), help="Directory of an image pack's IDX files.  [default: in the pack, or ../../data from there]")
@click.option("--queries", type=click.Choice(["all", "even", "odd"]), default="all", show_default=True, help="The queries to use.")
@click.option("--out", type=click.Path(), help="Keep the index here.  [default: a temporary directory]")
@click.option("--scores", type=click.Path(), help="Judge this matrix [examples, queries] (.npy or .npz) instead of an index.")
@query_options("Scores", ScoreOptions, without=_BUILD_HAS)
@config_options
@_json_option
def lds(
    pack: str,
    model: tuple[str, ...],
    index: str | None,
    data: str | None,
    queries: Any,
    out: str | None,
    scores: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare scores with what retraining on half-subsets did: the linear datamodeling score, with baselines.

    \b
      wherefrom evaluate lds packs/text-a
      wherefrom evaluate lds packs/text-a -o rank=64 -o curvature=ekfac --queries even
      wherefrom evaluate lds packs/mnist-a --data mnist/ --json
      wherefrom evaluate lds packs/text-a --scores theirs.npy

    PACK is a directory that `wherefrom pack` wrote, or one of the same layout (docs/evaluation.md). The index is built as `wherefrom build`
    does, with the options given here; the pack says how its documents were encoded.
    """
    from .ray_jobs.progress import Console

    source = click.get_current_context().get_parameter_source
    options = take_config_values(values)
    scoring: Any = take_options(values, ScoreOptions)
    place = Path(data) if data else None
    _quiet_libraries()
    from .evaluation.judge import judge_index, judge_scores

    if scores is not None:
        idle = [f"-o {name}" for name in options if name != "device"]
        idle += [f"--{name}" for name in ("index", "out", *option_fields(ScoreOptions)) if source(name) is ParameterSource.COMMANDLINE]
        if idle:
            raise UsageError(f"{idle[0]} means nothing beside --scores, for which no index is built")
        device = options.get("device", "auto")
        last = model[-1] if model else None
        judgement = judge_scores(Path(pack), Path(scores), model=last, data=place, half=queries, device=device)
    else:
        options["model"] = model or None
        with Console() as reporter:
            kept = Path(out) if out else None
            judgement = judge_index(
                Path(pack), options, index=index, data=place, half=queries, scoring=scoring, out=kept, reporter=reporter
            )
    _result(as_json, judgement.to_dict(), "show_judgement", judgement)


@evaluate.command()
@_INDEX
@_queries_option
@click.option("-k", type=int, default=10, show_default=True, help="Proponents of each query, and as many random examples.")
@_mode_option
@click.option("--optimizer", type=click.Choice(["sgd", "adam"]), default="sgd", show_default=True, help="Of the step.")
@click.option("--rate", type=float, default=1e-2, show_default=True, help="The step's learning rate.")
@_moved_model_option
@_device_option
@_task_option
@_json_option
def tailpatch(index: str, file: str, model: tuple[str, ...], device: str, task: str | None, as_json: bool, **options: Any) -> None:
    """Compare the query's loss before and after one optimizer step on each of the top proponents.

    \b
      wherefrom evaluate tailpatch my.wherefrom --file queries.jsonl
    """
    _quiet_libraries()
    from .client import Client
    from .evaluation.checks import tailpatch as run
    from .ray_jobs.progress import Console

    with Console() as reporter:
        report = run(Client(index, model=model, device=device, task=task), list(_read_queries(file)), reporter=reporter, **options)
    _result(as_json, report.to_dict(), "show_report", report)


@evaluate.command()
@_INDEX
@click.option("--train", required=True, help="Your training function, module:function (as for wherefrom pack).")
@click.option("--base", type=click.Path(), required=True, help="The model that training starts from, which has not seen the examples.")
@_queries_option
@click.option("-k", type=int, default=50, show_default=True, help="Examples to leave out.")
@click.option("--draws", type=int, default=5, show_default=True, help="Random choices to compare with.")
@_mode_option
@_moved_model_option
@_training_device_option
@_worker_options
@_json_option
def brittleness(index: str, train: str, base: str, file: str, as_json: bool, **options: Any) -> None:
    """Compare the query's loss after training without the top proponents with the loss after training without random examples.

    \b
      wherefrom evaluate brittleness my.wherefrom --train mytraining:train --base ./base --file queries.jsonl -k 50 --workers 4
    """
    _quiet_libraries()
    from .evaluation.checks import brittleness as run
    from .ray_jobs.progress import Console

    with Console() as reporter:
        report = run(index, list(_read_queries(file)), train, base, reporter=reporter, **options)
    _result(as_json, report.to_dict(), "show_report", report)


@evaluate.command()
@_INDEX
@click.option("--column", required=True, help="Metadata column that is true where an example's label is known to be wrong.")
@_json_option
def labels(index: str, column: str, as_json: bool) -> None:
    """Compare the ranking by self-influence with the examples whose labels are wrong.

    \b
      wherefrom evaluate labels my.wherefrom --column corrupted
    """
    from .evaluation.checks import labels as run

    report = run(index, column)
    _result(as_json, report.to_dict(), "show_report", report)


@evaluate.command()
@_INDEX
@click.argument("reference", type=click.Path())
@click.option("--file", type=click.Path(), help="JSON lines of queries.  [default: a sample of the index's rows]")
@click.option("-k", type=int, default=10, show_default=True, help="How many of the best must be found again.")
@_mode_option
@_json_option
def recall(index: str, reference: str, file: str | None, as_json: bool, **options: Any) -> None:
    """Compare a compressed index's best rows with those of its float32 reference.

    \b
      wherefrom evaluate recall int8.wherefrom float32.wherefrom
    """
    _quiet_libraries()
    from .evaluation.checks import recall as run

    report = run(index, reference, list(_read_queries(file)) if file else None, **options)
    _result(as_json, report.to_dict(), "show_report", report)


@evaluate.command(name="replay")
@_INDEX
@click.option("--run", required=True, type=click.Path(), help="Directory of the recorded training run.")
@_queries_option
@_mode_option
@_moved_model_option
@_training_device_option
@_worker_options
@_json_option
def evaluate_replay(index: str, run: str, file: str, as_json: bool, **options: Any) -> None:
    """Compare the index's scores with exact influence, by a replay of the training run.

    \b
      wherefrom evaluate replay my.wherefrom --run out/wherefrom-run --file queries.jsonl

    One replay says as much as many retrainings. BM25 and character n-grams are compared, too.
    """
    _quiet_libraries()
    from .evaluation.agreement import agreement
    from .ray_jobs.progress import Console

    with Console() as reporter:
        report = agreement(index, run, list(_read_queries(file)), reporter=reporter, **options)
    _result(as_json, report.to_dict(), "show_report", report)


@evaluate.command()
@_INDEX
@_queries_option
@_model_options
@_json_option
def usual(index: str, file: str, as_json: bool, **model: Any) -> None:
    """Measure what is usual for held-out texts, so that answers doubt queries that are unlike these.

    \b
      wherefrom evaluate usual my.wherefrom --file held-out.jsonl

    A build measures it on training examples, which a model may know by heart. Give 50 texts or more that training has not seen.
    """
    queries = list(_read_queries(file))
    measured = _local_client(index, model, queries).measure_usual(queries)
    record = {} if measured is None else measured.model_dump(exclude={"format"})
    if as_json:
        _print_json(record)
    else:
        say(f"what is usual for {len(queries):,} held-out texts is kept in {index}")


@evaluate.command()
@_INDEX
@click.option("--pack", type=click.Path(), help="Ground-truth pack of the index's documents.")
@click.option("--data", type=click.Path(), help="Directory of an image pack's IDX files.  [default: in the pack, or ../../data from there]")
@click.option("--queries", type=click.Choice(["all", "even", "odd"]), default="all", show_default=True, help="The pack's queries to use.")
@click.option("--run", type=click.Path(), help="Directory of a recorded training run, instead of a pack.")
@click.option("--file", type=click.Path(), help="With --run: JSON lines of queries.")
@click.option("--report", type=click.Path(), help="JSON report of wherefrom act, instead of either.")
@click.option("--keep/--no-keep", default=True, show_default=True, help="Write the slope into the index.")
@_training_device_option
@_worker_options
@_json_option
def slope(index: str, pack: str | None, data: str | None, queries: Any, file: str | None, as_json: bool, **options: Any) -> None:
    """Measure what a predicted nat is worth, and keep it in the index: answers are then in measured nats.

    \b
      wherefrom evaluate slope my.wherefrom --pack packs/text-a
      wherefrom evaluate slope my.wherefrom --run out/wherefrom-run --file queries.jsonl
      wherefrom evaluate slope my.wherefrom --report report.json
    """
    if (options["run"] is None) != (file is None):
        raise UsageError("--run is replayed for the queries of a file; give --run and --file together")
    _quiet_libraries()
    from .evaluation.slope import slope as run
    from .ray_jobs.progress import Console

    asked = list(_read_queries(file)) if file else []
    place = Path(data) if data else None
    with Console() as reporter:
        report = run(_place(index), pack, data=place, half=queries, queries=asked, reporter=reporter, **options)
    _result(as_json, report.to_dict(), "show_report", report)


@main.command(section=_JUDGE)
@click.option("--train", required=True, help="Your training function, module:function.")
@click.option(
    "--model", required=True, type=click.Path(), help="Directory or hub id of the tokenizer (and of the model to start from, if you do)."
)
@click.option("--data", required=True, type=click.Path(), multiple=True, help="Training documents, as for build; repeatable.")
@click.option("--queries", required=True, type=click.Path(), help="Documents whose losses are measured.")
@click.option("--out", required=True, type=click.Path(), help="Directory to make.")
@click.option("--subsets", type=int, default=60, show_default=True, help="Random subsets to retrain on.")
@click.option("--fraction", type=float, default=0.5, show_default=True, help="Of the documents, in each subset.")
@click.option("--seeds", type=int, default=1, show_default=True, help="Trainings on each subset; several show how noisy they are.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Longest example; the rest is cut off.")
@click.option("--append-eos/--no-append-eos", default=True, show_default=True, help="End each document with the end-of-text token.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the subsets.")
@_worker_options
@_training_device_option
@_json_option
def pack(as_json: bool, **options: Any) -> None:
    """Make ground truth for your own model: retrain on random subsets and measure.

    \b
      wherefrom pack --train mytraining:train --model ./base --data train.jsonl --queries held-out.jsonl --out mypack --workers 4
      wherefrom evaluate lds mypack

    The training function is train(examples, model, seed) -> torch.nn.Module: examples with token_ids, loss_mask and text, the --model,
    and a seed. Each training's losses are kept as soon as it ends; the same command continues an interrupted one.
    """
    _quiet_libraries()
    from .evaluation.retrain import PackConfig, make_pack
    from .ray_jobs.progress import Console

    with Console() as reporter:
        directory = make_pack(PackConfig(**options), reporter)
    if as_json:
        _print_json({"pack": str(directory)})
    else:
        say(f"judge an index on it:  wherefrom evaluate lds {directory}")


@main.command(section=_LOOK)
@click.option("--out", type=click.Path(), default="wherefrom-demo", show_default=True, help="Directory for model, corpus and index.")
@click.option("--workers", type=int, default=1, show_default=True, help="Processes that build the index.")
def demo(out: str, workers: int) -> None:
    """Train a small model on a small corpus, index it, and ask three queries.

    Needs no network and leaves everything behind to try.
    """
    _quiet_libraries()
    from .demo.run import run

    run(Path(out), workers)


def _quiet_libraries() -> None:
    """Keep transformers and datasets from writing their own bars and warnings among ours."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()
