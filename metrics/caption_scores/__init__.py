"""Caption scores as an `evaluate` metric. The folder travels to the Hub alone: its modules import only one another."""
