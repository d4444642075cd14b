"""The tests, in folders as the package has them; ``stages`` and ``slurm`` start whole stages."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "shards"
