"""The page of an exploration: charts, tables and the winner's recipe in one file."""
