"""Scripts that verify exports in fresh processes; they import nothing of this package."""
