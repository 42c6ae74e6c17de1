"""Reading what strangers wrote, and writing so that nothing is lost."""
