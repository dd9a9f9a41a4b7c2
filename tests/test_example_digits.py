"""The demo in its smallest form prints every row and draws the picture."""

import pytest

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

from examples import digits  # noqa: E402


def test_the_demo_prints_every_row_and_draws_the_weights(tmp_path, capsys):
    picture = tmp_path / "new" / "weights.png"
    digits.main(["--quick", "--picture", str(picture)])
    table = capsys.readouterr().out.split("Test accuracy in %\n")[1].split("\n\n")[0]
    heading, *rows = table.splitlines()
    assert heading.split()[-4:] == ["overall", "many", "medium", "few"]
    assert len(rows) == 14 and sum(row.startswith("BiKD") for row in rows) == 4
    assert all(0 <= float(number) <= 100 for row in rows for number in row.split()[-4:])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_seed_is_refused(capsys):
    with pytest.raises(SystemExit):
        digits.main(["--seeds", "0"])
    assert "--seeds is 0, expected at least 1" in capsys.readouterr().err
