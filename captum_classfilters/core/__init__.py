"""What every room stands on: the head, the pass over a loader, borrowing, files, errors."""
