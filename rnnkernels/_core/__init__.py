"""What every room below the modules speaks of: calls, checks, packed steps, the reference."""
