"""Plans a merge in integers, and executes the plan."""
