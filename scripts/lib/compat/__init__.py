"""What `scripts/compatibility.py` tries on a real host: rows of the table in `docs/compatibility.md`."""
