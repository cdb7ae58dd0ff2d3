"""What the commands do: bench, profile, doctor, report."""
