"""The language model example runs, and its hypergradient is right."""

import re

import torch

from examples import causal_lm


def test_it_trains_and_prints_perplexities(windows_of_four, capsys):
    perplexities = causal_lm.main(["--quick"])
    assert list(perplexities) == ["teacher", "plain KD", "fixed weights", "learned weights"]
    for by_domain in perplexities.values():
        assert by_domain.shape == (len(causal_lm.DOMAINS),)
        assert (1 < by_domain).all() and (by_domain < 2 * causal_lm.WORDS).all()
    assert not torch.equal(perplexities["plain KD"], perplexities["learned weights"])
    assert "learned weights" in capsys.readouterr().out


def test_its_hypergradient_is_right(capsys):
    default = torch.get_default_dtype()
    try:
        causal_lm.main(["--check"])
    finally:
        torch.set_default_dtype(default)
    error = float(re.search(r"relative error of (\S+)", capsys.readouterr().out)[1])
    assert error < 1e-5
