"""Fixtures: a saved model, a corpus file and an index built of them, made once a session."""

import os
from pathlib import Path

# One thread for each process, since several run tests at once: BLAS threads that wait for others' cores take several times as long. Ray's
# workers otherwise run at a low priority, and would wait for the tests beside them.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_worker_niceness": "0"}

import jaxtyping
import pytest

# With WHEREFROM_CHECK_TYPES=1 the types, shapes and dtypes in signatures are checked while the tests run, which takes half as long again
# (.ci/types does). Modules are left out where tests hand in what their signatures exclude, to see that it is refused in words, or whose
# classes others pickle or compile.
UNCHECKED = {"query.options", "ray_jobs.executor", "store.fields", "store.kernels"}
if os.environ.get("WHEREFROM_CHECK_TYPES"):
    root = Path(__file__).parents[1]
    files = [*root.glob("*.py"), *(path for init in root.glob("*/__init__.py") for path in init.parent.glob("*.py"))]
    names = {".".join(path.relative_to(root).with_suffix("").parts) for path in files}
    jaxtyping.install_import_hook([f"wherefrom.{name}" for name in sorted(names - UNCHECKED)], "typecheck.check")

from helpers import SHARED, make_model, make_tokenizer, random_texts, write_jsonl  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny float32 GPT-2 with its tokenizer, saved as a user would have it."""
    directory = tmp_path_factory.mktemp("model")
    make_model("gpt2", "float32").save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """120 documents with a metadata column."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return write_jsonl(path, [{"id": f"d{i}", "text": t, "year": 1900 + i} for i, t in enumerate(random_texts(120, seed=3))])


@pytest.fixture(scope="session")
def index_dir(tmp_path_factory, model_dir, corpus_file):
    """A small float32 index of several shards, shared by tests that do not change it."""
    from wherefrom import BuildConfig
    from wherefrom.ray_jobs.build import build

    out = tmp_path_factory.mktemp("indexes") / "small.wherefrom"
    build(BuildConfig(model=str(model_dir), data=(str(corpus_file),), out=str(out), rank=4, shard_rows=32))
    return out


@pytest.fixture(scope="session")
def shared():
    """The real data next to the checkout; what needs it skips visibly without it."""
    if not (SHARED / "data/corpus.jsonl").is_file():
        pytest.skip(f"the shared real data is not at {SHARED}")
    return SHARED
