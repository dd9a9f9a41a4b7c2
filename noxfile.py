"""The core's tests on every Python and torch that pyproject.toml promises: `nox`, or one of them
by `nox -s "tests-3.11(torch='2.6.0')"`. What was run, and when, is in docs/versions.md."""

import nox

CORE = [
    *("optimizer", "engines", "golden", "loss", "checkpoint", "update_rules", "inner_step"),
    "torch_private",
    *("replay", "replay_dropout", "replay_embedding"),
    *("habits_accelerate", "habits_accumulation", "habits_calls", "habits_modules"),
    *("habits_precision", "habits_schedulers"),
]
FILES = [f"tests/test_{name}.py" for name in CORE]

nox.options.reuse_existing_virtualenvs = True


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
@nox.parametrize("torch", ["2.6.0", "2.7.1", "2.9.1", "2.11.0", "2.13.0", "2.14.1"])
def tests(session: nox.Session, torch: str) -> None:
    """The newest of everything else that goes with it; other tests by `nox -- FILE …`."""
    session.install(f"torch=={torch}", "-e", ".[test]")
    session.run(
        "pytest", "-n", "logical", "--maxprocesses", "8", "--dist", "loadfile",
        *(session.posargs or FILES),
    )
