"""Distil a causal language model on texts of four domains, some of which are rare.

The texts come with Python: the help on the language, and the source code of asyncio, email and xml,
100 : 30 : 10 : 3 pieces of 48 words. A decoder teaches one an eighth of its size. The weight
net gives every sequence its own two weights, by its mean losses and by how frequent its domain is;
the loop gives that to the criterion. In the meta set all domains are equally frequent; all students
train on it too. Words outside the vocabulary are read, and not predicted.

    python examples/causal_lm.py            # two to three minutes
    python examples/causal_lm.py --quick    # a few steps, only to see that it runs
    python examples/causal_lm.py --check    # is the hypergradient right in this loop?

It prints each domain's perplexity for plain KD, for weights fixed by how frequent a domain is, and
for learned ones.
"""

from __future__ import annotations

import argparse
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.check import check_hypergradient

DOMAINS = {"help": 1000, "asyncio": 300, "email": 100, "xml": 30}  # pieces for training
META, TEST = 10, 100  # pieces of each domain
WORDS, LENGTH, IGNORED = 800, 48, -100
BATCH_SIZE = 16
TEACHER, STUDENT = (96, 2), (32, 1)  # width, layers
STEPS = {"teacher": 400, "student": 512}


class Texts(NamedTuple):
    tokens: Tensor  # [N, L]; 0 for all words outside the vocabulary
    domains: Tensor  # [N], in the order of DOMAINS

    @property
    def labels(self) -> Tensor:
        return self.tokens.masked_fill(self.tokens == 0, IGNORED)

    def at(self, chosen: Tensor) -> Texts:
        return Texts(self.tokens[chosen], self.domains[chosen])


class Decoder(nn.Module):
    """Token ids [B, L] to logits [B, L, V], the embedding being the head too."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        hidden = self.embed(tokens) + self.position(torch.arange(length))
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        for block in self.blocks:
            hidden = block(hidden, src_mask=later)
        return self.norm(hidden) @ self.embed.weight.T


class ByFrequency(nn.Module):
    """Weights that fall with the root of how frequent a domain is, and average a half."""

    features = ("given.log_frequency",)

    def forward(self, features: Tensor) -> Tensor:
        weights = (-features / 2).exp().expand(-1, 2)
        return weights / (2 * weights.mean())


def main(argv: Sequence[str] | None = None) -> dict[str, Tensor]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--check", action="store_true", help="check the hypergradient and stop")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.check:
        torch.set_default_dtype(torch.float64)
    short = args.quick or args.check
    train, meta, test = texts(args.seed, TEST // 10 if short else TEST)
    both = Texts(*(torch.cat(parts) for parts in zip(train, meta)))
    teacher = train_teacher(train, 10 if short else STEPS["teacher"], args.seed)
    features = ("student_ce", "teacher_ce", "given.log_frequency")
    nets = {
        "plain KD": None,
        "fixed weights": ByFrequency(),
        "learned weights": MetaWeightNet(features, mean=0.5, ratio=10.0),
    }
    steps = 8 if short else STEPS["student"]
    students = {"teacher": teacher}
    for name, net in nets.items():
        learns = name == "learned weights"
        if learns or not args.check:
            students[name] = distil(
                teacher, net, both, meta if learns else None, steps, args.seed, check=args.check
            )
    if args.check:
        return {}
    perplexities = {name: perplexity(model, test) for name, model in students.items()}
    print_table(perplexities)
    return perplexities


def distil(
    teacher: nn.Module,
    weight_net: nn.Module | None,
    train: Texts,
    meta: Texts | None,
    steps: int,
    seed: int,
    *,
    check: bool = False,
) -> nn.Module:
    """Trains a student; on a meta set its weights learn beside it."""
    torch.manual_seed(seed + 1)
    student = Decoder(*STUDENT)
    criterion = WeightedKDLoss(weight_net, temperature=2.0, per="sequence", ignore_index=IGNORED)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    if meta is not None:
        order = torch.randperm(len(meta.tokens))
        batches = list(zip(*(x[order].split(2 * BATCH_SIZE) for x in (meta.tokens, meta.labels))))
        optimizer = BilevelOptimizer(optimizer, student, criterion, batches)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    counts = torch.bincount(train.domains).to(torch.get_default_dtype())
    log_frequency = (counts / counts.sum()).log()
    generator = torch.Generator().manual_seed(seed + 2)

    def step(batch: Texts) -> None:
        logits = student(batch.tokens)
        with torch.no_grad():
            teacher_logits = teacher(batch.tokens)
        loss = criterion(
            logits[:, :-1], teacher_logits[:, :-1], batch.labels[:, 1:],
            given={"log_frequency": log_frequency[batch.domains]},
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    if check:
        few = [drawn(train, generator, 4) for _ in range(optimizer.unroll)]
        print(check_hypergradient(optimizer, step, few, raise_exception=False))
        return student
    for _ in range(steps):
        step(drawn(train, generator))
    return student


def train_teacher(train: Texts, steps: int, seed: int) -> nn.Module:
    """On labels alone."""
    torch.manual_seed(seed)
    teacher = Decoder(*TEACHER)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = drawn(train, generator)
        loss = next_word(teacher(batch.tokens), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return teacher.eval()


def next_word(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], ignore_index=IGNORED)


def drawn(texts: Texts, generator: torch.Generator, count: int = BATCH_SIZE) -> Texts:
    """A batch."""
    return texts.at(torch.randint(len(texts.tokens), (count,), generator=generator))


def texts(seed: int, test: int) -> tuple[Texts, Texts, Texts]:
    """Long-tailed ones for training, META and `test` of each domain."""
    generator = torch.Generator().manual_seed(seed)
    words = {domain: re.findall(r"[a-z]+|\d|\n *|[^\sa-z\d]", text(domain)) for domain in DOMAINS}
    fewest = min(map(len, words.values()))
    counted = Counter(word for own in words.values() for word in own[:fewest])
    ids = {word: 1 + i for i, (word, _) in enumerate(counted.most_common(WORDS - 1))}
    parts: list[list[Texts]] = [[], [], []]
    for number, (domain, count) in enumerate(DOMAINS.items()):
        tokens = torch.tensor([ids.get(word, 0) for word in words[domain]])
        pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        pieces = pieces[torch.randperm(len(pieces), generator=generator)]
        held, first = 0, [test, META, count]
        for part, size in zip(reversed(parts), first):
            own = pieces[held : held + size]
            part.append(Texts(own, torch.full((len(own),), number)))
            held += size
    train, meta, tests = (Texts(*(torch.cat(x) for x in zip(*part))) for part in parts)
    return train, meta, tests


def text(domain: str) -> str:
    if domain == "help":
        return "\n".join(topics[name] for name in sorted(topics)).lower()
    folder = Path(sysconfig.get_path("stdlib")) / domain
    files = (path.read_text(errors="ignore") for path in sorted(folder.rglob("*.py")))
    return "\n".join(files).lower()


@torch.no_grad()
def perplexity(model: nn.Module, test: Texts) -> Tensor:
    """By domain."""
    model.eval()
    parts = [test.at((test.domains == domain).nonzero()[:, 0]) for domain in range(len(DOMAINS))]
    return torch.stack([next_word(model(part.tokens), part.labels).exp() for part in parts])


def print_table(perplexities: dict[str, Tensor]) -> None:
    print(f"{'perplexity':>16}" + "".join(f"{name:>9}" for name in DOMAINS) + f"{'mean':>9}")
    for name, by_domain in perplexities.items():
        row = [*by_domain.tolist(), by_domain.log().mean().exp().item()]
        print(f"{name:>16}" + "".join(f"{value:9.1f}" for value in row))


if __name__ == "__main__":
    main()
