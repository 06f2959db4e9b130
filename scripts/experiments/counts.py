"""What the steps of data-prep have counted of a text."""

from pathlib import Path

from experiments.results import read_json


class Counts:
    """Of a folder of data-prep."""

    def __init__(self, task: str, data: Path) -> None:
        self.counts = {path.stem: read_json(path) for path in (data / "counts").glob("*.json")}
        self.sides = 2 if task == "wmt" else 1
        self.pieces: int = self.counts["spm"]["dictionary"]

    def tokens(self, split: str) -> int:
        """Of one side on average; each line has its end, too."""
        counted = self.counts[f"bpe-{split}"]
        return int(counted["pieces"] // self.sides + counted["kept"])

    def about(self) -> str:
        sizes = []
        for split in ("train", "valid", "test"):
            size = f"{self.counts[f'bpe-{split}']['kept']:,} pairs" if self.sides == 2 else ""
            sizes.append(f"{split} {size or f'{self.tokens(split):,} tokens'}")
        return f"{', '.join(sizes)}; {self.pieces:,} pieces"
