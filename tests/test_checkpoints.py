"""Several models in one index: each has the components that it would have alone, and scores are their weighted sum."""

import json
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import array_bytes, assert_close, make_model, make_tokenizer, random_texts, words
from wherefrom import BuildConfig, Client
from wherefrom.cli import main
from wherefrom.query.metric import Metric
from wherefrom.query.options import Query
from wherefrom.query.scoring import all_scores
from wherefrom.ray_jobs.build import build
from wherefrom.store.errors import IncompatibleError, UsageError
from wherefrom.store.shard import rows_path

OPTIONS = dict(rank=4, components=("head", "embeddings", "blocks"), head_bits=32, shard_rows=50)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two models; the first is saved without a tokenizer, as checkpoints often are."""
    here = tmp_path_factory.mktemp("checkpoints")
    for number in (1, 2):
        make_model("gpt2", "float32", seed=number).save_pretrained(here / f"c{number}")
        make_tokenizer().save_pretrained(here / f"c{number}")
    return [str(here / "c1"), str(here / "c2")]


@pytest.fixture(scope="module")
def index(tmp_path_factory, checkpoints, corpus_file):
    out = tmp_path_factory.mktemp("both") / "both.wherefrom"
    build(BuildConfig(model=tuple(checkpoints), data=(str(corpus_file),), out=str(out), **OPTIONS))
    return out


def scores(client, queries, metric=Metric()):
    return np.concatenate([s for _, s in all_scores(client.index, client.encode(queries), metric)], axis=1)


def test_each_model_has_the_components_that_it_has_alone(tmp_path, checkpoints, corpus_file, index):
    both, queries = Client(index), [Query(text=t) for t in random_texts(5, seed=8)]
    names = [s.name for s in both.index.manifest.components]
    assert names == [f"{part}-{number}" for number in (1, 2) for part in ("head", "embeddings", "blocks")]
    total = 0
    for number, path in enumerate(checkpoints, 1):
        # the seed of a further model's projections and rotations is its own, so that errors do not add up
        build(BuildConfig(model=path, data=(str(corpus_file),), out=str(tmp_path / str(number)), seed=number - 1, **OPTIONS))
        alone, weight_ratios = Client(tmp_path / str(number)), {}
        for component in alone.index.manifest.components:
            name = f"{component.name}-{number}"
            assert both.index.component(name) == component.model_copy(
                update={"name": name, "model": number - 1, "weight": both.index.component(name).weight, "curvature": component.curvature}
            )
            for shard, other in zip(both.index.shards, alone.index.shards, strict=True):
                arrays = [
                    contents(client.index.path, s.id, component_name)
                    for client, s, component_name in ((both, shard, name), (alone, other, component.name))
                ]
                assert arrays[0] == arrays[1]
                assert arrays[0]
            weight_ratios[component.name] = both.index.component(name).weight / component.weight
        metric = Metric(weights=weight_ratios)
        total = total + scores(alone, queries, metric)
    assert_close(scores(both, queries), total, 1e-4)


def contents(index, shard, component):
    """The entries of a component's group in a shard's file."""
    with zipfile.ZipFile(rows_path(index, shard)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist() if name.startswith(f"{component}/")}


def test_weights_by_part_and_by_component(index):
    client, queries = Client(index), [Query(text=words(3, 4, 5))]
    heads = scores(client, queries, Metric(weights={"embeddings": 0, "blocks": 0}))
    first = scores(client, queries, Metric(weights={"embeddings": 0, "blocks": 0, "head-2": 0}))
    second = scores(client, queries, Metric(weights={"embeddings": 0, "blocks": 0, "head-1": 0}))
    assert_close(first + second, heads, 1e-5, np.abs(first).max() + np.abs(second).max())
    twice = scores(client, queries, Metric(weights={"embeddings": 0, "blocks": 0, "head": 2, "head-1": 0.5}))
    assert_close(twice, first + 2 * second, 1e-5, np.abs(first).max() + 2 * np.abs(second).max())
    with pytest.raises(UsageError, match="no component 'head-3'"):
        scores(client, queries, Metric(weights={"head-3": 1}))


def test_a_number_of_bytes_is_shared_by_the_models(tmp_path, checkpoints, corpus_file):
    out = tmp_path / "i"
    arguments = ["build", "--model", checkpoints[0], "--model", checkpoints[1], "--data", corpus_file, "--out", out]
    result = CliRunner().invoke(main, [str(a) for a in [*arguments, "--bytes-per-example", "2600", "--json"]])
    assert result.exit_code == 0, result.output
    info = json.loads(result.stdout)
    bytes_by_model = {n: sum(s["bytes_per_example"] for s in info["components"] if s["name"].endswith(f"-{n}")) for n in (1, 2)}
    assert bytes_by_model[1] == pytest.approx(bytes_by_model[2], rel=0.02)
    assert 2000 < array_bytes(out) / 120 <= 2600 * 1.03
    assert [m["id"] for m in info["models"]] == checkpoints
    client = Client(out)
    for row in (0, 40, 119):
        assert client.query(row=row, mode="cosine", k=1).proponents[0].row == row
        assert client.query(text=client.index.example(row).text, mode="cosine", k=1).proponents[0].row == row


def test_models_that_do_not_belong_together_are_refused(tmp_path, checkpoints, corpus_file, index):
    config = BuildConfig(model=tuple(checkpoints), data=(str(corpus_file),), out=str(tmp_path / "i"), **OPTIONS)
    with pytest.raises(UsageError, match="named twice"):
        config.replace(model=(checkpoints[0], checkpoints[0]))
    with pytest.raises(UsageError, match="2 models and 3 revisions"):
        config.replace(revision=("a", "b", "c"))
    assert config.replace(model="hub/model", revision=("a", "b")).models == ("hub/model", "hub/model")
    assert config.replace(revision=("a",)).revisions == ("a", "a")
    other = tmp_path / "other"
    model = make_model("gpt2", "float32")
    model.resize_token_embeddings(70)
    model.save_pretrained(other)
    with pytest.raises(IncompatibleError, match="embeds 70 tokens"):
        build(config.replace(model=(checkpoints[0], str(other))))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "w1"
    tokenizer.save_pretrained(other)
    with pytest.raises(IncompatibleError, match="the tokenizer of"):
        build(config.replace(model=(checkpoints[0], str(other))))
    with pytest.raises(UsageError, match="built with 2 models"):
        Client(index, model=checkpoints[0]).query(text="w1 w2")
    with pytest.raises(IncompatibleError, match="weights at"):
        _ = Client(index, model=checkpoints[::-1]).encoder
