"""What the package costs, as ratios that are measured side by side in one run."""
