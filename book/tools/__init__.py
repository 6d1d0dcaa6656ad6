"""What the book needs around its chapters; it alone knows where the checkout lies. Installed as ``sdecor_book``."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
