"""The Python door: `wherefrom.build` with models and data in memory, `connect` with a model, and answers as tables."""

import os

import numpy as np
import pytest
import wherefrom
from helpers import make_model, make_tokenizer, random_texts, write_jsonl
from wherefrom.query.answers import Answer, Explanation
from wherefrom.ray_jobs.progress import Silent
from wherefrom.store.errors import UsageError

TEXTS = random_texts(40, seed=11)
DOCUMENTS = [{"id": f"d{i}", "text": text, "source": "even" if i % 2 == 0 else "odd"} for i, text in enumerate(TEXTS)]
OPTIONS = dict(bytes_per_example=400, progress=False)


def files(index, folder="rows"):
    """The contents of an index's files in a folder, by size and content: their names depend on the build's inputs."""
    return sorted(path.read_bytes() for path in (index.path / folder).iterdir())


def rows(index):
    """Every stored row of every component."""
    return [
        [getattr(index.vectors(row, component), field).tobytes() for field in ("keys", "vectors") if component.kind == "sparse"]
        or index.vectors(row, component).values.tobytes()
        for component in index.manifest.components
        for row in range(len(index))
    ]


@pytest.fixture(scope="module")
def model():
    return make_model("gpt2", "float32")


@pytest.fixture(scope="module")
def index(tmp_path_factory, model):
    return wherefrom.build(model, DOCUMENTS, tmp_path_factory.mktemp("door") / "i.wherefrom", tokenizer=make_tokenizer(), **OPTIONS)


@pytest.fixture(scope="module")
def client(index, model):
    return wherefrom.connect(index, model=model, tokenizer=make_tokenizer())


@pytest.fixture(scope="module")
def answer(client):
    return client.query(text=TEXTS[3], k=4, group_by="source")


def test_a_model_in_memory_keeps_its_mode_its_gradients_and_its_weights(tmp_path):
    model = make_model("gpt2", "float32").train()
    names = [name for name, _ in model.named_parameters()]
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()]
    wherefrom.build(model, DOCUMENTS, tmp_path / "i", tokenizer=make_tokenizer(), **OPTIONS)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == names[::2]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all((parameter == before).all() for parameter, before in zip(model.parameters(), weights, strict=True))
    assert [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("options", [{"bytes_per_example": 400}, {"rank": 4}])
def test_rows_of_a_model_in_memory_are_those_of_its_directory_to_the_bit(tmp_path, model, options):
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    named = wherefrom.build(tmp_path / "model", DOCUMENTS, tmp_path / "named", progress=False, **options)
    loaded = wherefrom.build(model, DOCUMENTS, tmp_path / "loaded", tokenizer=make_tokenizer(), progress=False, **options)
    assert rows(named) == rows(loaded)
    assert [m.fingerprint for m in named.manifest.models] == [m.fingerprint for m in loaded.manifest.models]
    assert [c.weight for c in named.manifest.components] == [c.weight for c in loaded.manifest.components]


def test_dictionaries_a_generator_and_a_dataset_give_the_same_rows(tmp_path, model, index):
    datasets = pytest.importorskip("datasets")
    kinds = {"generator": (dict(record) for record in DOCUMENTS), "dataset": datasets.Dataset.from_list(DOCUMENTS)}
    for name, data in kinds.items():
        built = wherefrom.build(model, data, tmp_path / name, tokenizer=make_tokenizer(), **OPTIONS)
        assert rows(built) == rows(index), name
        examples = [built.example(row) for row in range(len(built))]
        assert [(e.id, e.text, e.source) for e in examples] == [(d["id"], d["text"], d["source"]) for d in DOCUMENTS], name


def test_a_second_build_finds_the_first_finished(tmp_path, model):
    stages = []

    class Heard(Silent):
        def stage(self, name, total):
            stages.append(name)

    arguments = dict(tokenizer=make_tokenizer(), reporter=Heard(), bytes_per_example=400)
    first = wherefrom.build(model, DOCUMENTS, tmp_path / "i", **arguments)
    assert stages
    stages.clear()
    second = wherefrom.build(model, iter(DOCUMENTS), tmp_path / "i", **arguments)
    assert not stages
    assert (second.manifest.number, files(second)) == (1, files(first))
    with pytest.raises(wherefrom.WherefromError, match="the corpus files"):
        wherefrom.build(model, DOCUMENTS[1:], tmp_path / "i", **arguments)
    with pytest.raises(wherefrom.WherefromError, match="the model's weights"):
        wherefrom.build(make_model("gpt2", "float32", seed=1), DOCUMENTS, tmp_path / "i", **arguments)


def test_data_in_memory_leaves_no_file_behind(tmp_path, tmp_path_factory, model, monkeypatch):
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    wherefrom.build(model, DOCUMENTS, tmp_path / "i", tokenizer=make_tokenizer(), **OPTIONS)
    with pytest.raises(wherefrom.WherefromError, match="item 2"):
        wherefrom.build(model, [{"text": "w1 w2"}, "w3"], tmp_path / "j", tokenizer=make_tokenizer(), **OPTIONS)
    assert not list(folder.iterdir())
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(model="somewhere", data=DOCUMENTS, tokenizer=make_tokenizer()), "a tokenizer belongs to a model in memory"),
        (dict(model=[make_model("gpt2", "float32"), "somewhere"], data=DOCUMENTS), "either all in memory or all"),
        (dict(model="somewhere", data={"text": "w1"}), "give a path, a list of dictionaries, or a dataset"),
        (dict(model="somewhere", data=7), "data has the type int"),
        (dict(model="somewhere", data=[]), "the data has no documents"),
        (dict(model="somewhere", data=iter(())), "the data has no documents"),
        (dict(model="somewhere", data=[{"text": object()}]), "item 1 of the data"),
        (dict(model="somewhere", data=[{"text": "w1"}], ranks=3), "there is no option 'ranks'"),
    ],
)
def test_wrong_arguments_are_errors_of_one_sentence(tmp_path, arguments, message):
    with pytest.raises(wherefrom.WherefromError, match=message):
        wherefrom.build(out=tmp_path / "i", progress=False, **arguments)
    assert not (tmp_path / "i").exists()


def test_a_client_with_a_model_in_memory_answers_as_one_of_its_directory(tmp_path, model, index, client):
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    named = wherefrom.connect(index.path, model=tmp_path / "model")
    query = wherefrom.Query(text=TEXTS[5])
    assert np.array_equal(named.scores([query]), client.scores([query]))
    assert named.query(query).proponents == client.query(query).proponents
    other = wherefrom.connect(index, model=make_model("gpt2", "float32", seed=1), tokenizer=make_tokenizer())
    with pytest.raises(wherefrom.WherefromError, match="the weights at"):
        other.query(query)


def test_a_client_leaves_its_model_as_it_was(index):
    model = make_model("gpt2", "float32").train().requires_grad_(True)
    client = wherefrom.connect(index, model=model, tokenizer=make_tokenizer())
    client.explain([2], wherefrom.Query(text=TEXTS[2]))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_scores_are_an_array_of_queries_and_rows(client):
    queries = [wherefrom.Query(text=TEXTS[0]), wherefrom.Query(row=7)]
    scores = client.scores(queries, where='source == "odd"')
    assert scores.shape == (2, len(DOCUMENTS))
    assert np.array_equal(np.isnan(scores), np.tile(np.arange(len(DOCUMENTS)) % 2 == 0, (2, 1)))
    best = client.query(queries[0], where='source == "odd"', k=1, rerank=0).proponents[0]
    assert (np.nanargmax(scores[0]), np.nanmax(scores[0])) == (best.row, np.float32(best.score))


def test_groups_and_baselines_are_frames(client, answer):
    pytest.importorskip("pandas")
    pytest.importorskip("scipy")
    groups = answer.groups_to_pandas()
    assert groups["value"].tolist() == [group.value for group in answer.groups]
    assert groups["total"].sum() == pytest.approx(float(client.scores([wherefrom.Query(text=TEXTS[3])]).sum()), rel=1e-4)
    assert answer.baselines_to_pandas().empty
    compared = client.query(text=TEXTS[3], k=2, baselines=True)
    frame = compared.baselines_to_pandas()
    assert frame["id"].tolist() == [id for baseline in compared.baselines for id in baseline.ids]
    assert frame["rank"].tolist()[:2] == [1, 2]
    assert compared.groups_to_pandas().empty
    assert "Baselines" in compared._repr_html_()


def test_an_explanation_is_a_frame_whose_parts_add_up(client, answer):
    pytest.importorskip("pandas")
    (explanation,) = client.explain([answer.proponents[0].row], wherefrom.Query(text=TEXTS[3]))
    sums = explanation.to_pandas().groupby("kind")["score"].sum()
    size = sum(abs(part.score) for part in explanation.vocabulary)
    for kind in ("component", "layer", "block", "shared token"):
        assert sums[kind] == pytest.approx(explanation.score, abs=1e-5 * size), kind
    for kind in ("example token", "query token"):
        assert sums[kind] == pytest.approx(explanation.recomputed, abs=1e-4 * size), kind
    frame = explanation.to_pandas()
    assert frame[frame["kind"] == "shared token"]["token"].tolist() == [part.token for part in explanation.vocabulary]
    (plain,) = client.explain([0], wherefrom.Query(row=1), tokens=False)
    assert set(plain.to_pandas()["kind"]) <= {"component", "layer", "block", "shared token"}


def test_answers_and_explanations_are_html_that_escapes_what_is_stored(tmp_path, model, answer, client):
    html = answer._repr_html_()
    assert html.count("<table>") == html.count("</table>") == 3
    assert all(f"<td>{a.id}</td>" in html for a in answer.proponents + answer.opponents)
    explanation = client.explain([1], wherefrom.Query(text=TEXTS[1]))[0]
    assert "<h4>component</h4>" in explanation._repr_html_()
    assert repr(explanation) == f"Explanation(row 1, 'd1', score {explanation.score:.4g})"
    record = explanation.to_dict() | {"id": "<b>&", "example": {"tokens": ["<script>", "\x1b[2J"], "scores": [1.0, -2.0]}}
    hostile = Explanation.from_dict(record)._repr_html_()
    assert "<script>" not in hostile
    assert "<b>" not in hostile
    assert "\x1b" not in hostile
    record = answer.to_dict()
    record["groups"][0]["value"] = "<script>"
    assert "<script>" not in Answer.from_dict(record)._repr_html_()


def test_checks_take_an_open_index_or_its_directory(index):
    actual = wherefrom.evaluate.recall(index, index.path, [wherefrom.Query(row=3)], k=2)
    assert actual == wherefrom.evaluate.recall(index.path, index, [wherefrom.Query(row=3)], k=2)
    with pytest.raises(wherefrom.WherefromError, match="column"):
        wherefrom.evaluate.labels(index, "source")


def test_a_pack_takes_paths(tmp_path, model):
    pytest.importorskip("scipy")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name, records in (("train", DOCUMENTS[:8]), ("queries", DOCUMENTS[8:10])):
        write_jsonl(tmp_path / f"{name}.jsonl", records)
    files = (tmp_path / "train.jsonl", tmp_path / "queries.jsonl")
    pack = wherefrom.evaluate.pack("training:train", tmp_path / "model", files[0], files[1], tmp_path / "pack", subsets=2, max_tokens=64)
    judgement = wherefrom.evaluate.lds(pack, baselines=False, bytes_per_example=400)
    assert (judgement.subsets, judgement.queries, judgement.examples) == (2, 2, 8)
    assert "so few subsets say hardly anything" in judgement.protocol


def test_an_index_of_a_model_from_nowhere_says_so(index):
    with pytest.raises(wherefrom.WherefromError, match=r"was built from a model in memory; give `model` \(of texts, `tokenizer` too\)"):
        wherefrom.connect(index).query(text=TEXTS[0])
    assert wherefrom.connect(index).query(row=3, k=1).proponents


def test_unknown_options_of_a_connection_are_refused_in_words(index):
    with pytest.raises(UsageError, match="model is not an option of a RemoteClient; it has index, token, timeout"):
        wherefrom.connect("http://127.0.0.1:1", model="m")
    with pytest.raises(UsageError, match="token is not an option of a Client; it has model"):
        wherefrom.connect(index, token="t")


@pytest.mark.skipif("WHEREFROM_CHECK_TYPES" in os.environ, reason="the type checker refuses them first")
def test_things_that_are_no_queries_are_refused_in_words(client):
    for call in (client.query, client.query_many, client.scores, client.encode):
        with pytest.raises(wherefrom.WherefromError, match="queries are a list of Query objects"):
            call("w1 w2")
    with pytest.raises(wherefrom.WherefromError, match="queries are a list of Query objects"):
        client.scores(wherefrom.Query(row=1))
    with pytest.raises(wherefrom.WherefromError, match="give `row` in it"):
        client.query(wherefrom.Query(row=1), row=2)
