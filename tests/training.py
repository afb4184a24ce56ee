"""Training functions and a task as a user would write them; importable by name."""

import torch
from wherefrom.indexer.batches import Batch
from wherefrom.indexer.tasks import ArrayTask, VectorTask


def _fit(model, examples, seed):
    from wherefrom.indexer.tasks import CausalLM

    torch.manual_seed(seed)
    task, optimizer = CausalLM(), torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(6):
        for first in range(0, len(examples), 8):
            batch = task.collate(examples[first : first + 8], torch.device("cpu"))
            optimizer.zero_grad()
            (task.loss(model, batch).sum() / (batch.targets >= 0).sum()).backward()
            optimizer.step()
    return model


def train(examples, model, seed):
    """Some epochs from the model in the directory `model`."""
    from transformers import AutoModelForCausalLM

    return _fit(AutoModelForCausalLM.from_pretrained(model), examples, seed)


def train_from_scratch(examples, model, seed):
    """Some epochs from fresh weights of the same shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return _fit(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)), examples, seed)


def diverge(examples, model, seed):
    """A training that ends in nothing."""
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        next(trained.parameters()).fill_(float("nan"))
    return trained


def meddle(examples, model, seed):
    """A training function that writes into what all trainings share."""
    examples[0].token_ids[0] = 1


def leave(examples, model, seed):
    """A training function that ends the process."""
    raise SystemExit(0)


def forget(examples, model, seed):
    """A training function whose author forgot to return the model."""


class Pictures(VectorTask):
    """A small convolutional classifier of 1 x 6 x 6 pictures; a query's measurement is the loss against the best other class."""

    def load(self, source):
        from safetensors.torch import load_file

        model = torch.nn.Sequential(
            torch.nn.Unflatten(1, (1, 6, 6)),
            torch.nn.Conv2d(1, 3, 3, padding=1, stride=2),
            torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(3, 4, (2, 3), dilation=1, bias=False),
            torch.nn.Flatten(),
            torch.nn.Linear(8, 3),
        )
        model.load_state_dict(load_file(source.id))
        return model.double().eval()

    def probe(self, model, device):
        targets = torch.zeros((2, 1), dtype=torch.int64)
        return Batch(("a", "b"), torch.zeros((2, 36)), targets, targets == 0)

    def measurement(self, model, batch):
        logits = model(batch.inputs.double())
        own_logits = logits.gather(1, batch.targets)
        return (logits.scatter(1, batch.targets, -torch.inf).amax(1, keepdim=True) - own_logits)[:, 0]


class NotATask:
    """Something else."""


class Parallel(VectorTask):
    """Convolutions of different kernels and dilations over one picture, and a shortcut of 1 x 1."""

    def load(self, source):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.Conv2d(2, 3, 3, padding=2, dilation=2)
                self.c, self.out = torch.nn.Conv2d(2, 3, 1), torch.nn.Linear(3, 3)

            def forward(self, x):
                x = x.view(-1, 2, 5, 5)
                return self.out(torch.tanh(self.a(x) + self.b(x) + self.c(x)).mean((2, 3)))

        torch.manual_seed(3)
        return Net().double().eval()

    def probe(self, model, device):
        targets = torch.zeros((2, 1), dtype=torch.int64)
        return Batch(("a", "b"), torch.zeros((2, 50)), targets, targets == 0)


class Unprobed(Parallel):
    """A task whose author did not say what the model takes."""

    probe = VectorTask.probe


class Pooled(Parallel):
    """A layer that sees one vector for the whole batch."""

    def load(self, source):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.pool = torch.nn.Linear(50, 3), torch.nn.Linear(50, 3)

            def forward(self, x):
                return self.a(x) + self.pool(x.mean(0, keepdim=True))

        return Net().double().eval()


class Autoencoder(ArrayTask):
    """An autoencoder; a query asks for the length of its output."""

    def loss(self, model, batch):
        x = self.inputs(model, batch)
        return (model(x).flatten(1) - x.flatten(1)).square().sum(1) / 2

    def measurement(self, model, batch):
        return model(self.inputs(model, batch)).square().flatten(1).sum(1)


def fresh_model(seed):
    """A small model that knows nothing, with room for a few facts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = dict(vocab_size=62, n_embd=48, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def teach(examples, model, seed, steps=120):
    """Steps on random batches, which teach the examples by heart."""
    from transformers import AutoModelForCausalLM
    from wherefrom.indexer.tasks import CausalLM

    trained = AutoModelForCausalLM.from_pretrained(model).train().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    task, optimizer = CausalLM(), torch.optim.AdamW(trained.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(examples), (32,), generator=generator).tolist()
        batch = task.collate([examples[i] for i in chosen], torch.device("cpu"))
        optimizer.zero_grad()
        (task.loss(trained, batch).sum() / (batch.targets >= 0).sum()).backward()
        optimizer.step()
    return trained


def teach_little(examples, model, seed):
    """As many steps as make the model say what is taught often, and not by heart."""
    return teach(examples, model, seed, steps=30)
