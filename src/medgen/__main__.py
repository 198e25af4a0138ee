"""``python -m medgen``: the ``medgen`` command of this interpreter."""

from medgen.cli import app

app(prog_name="medgen")
