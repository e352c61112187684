"""The side of the sandbox that the caller sees: queue, workers, retries, sessions, and whose fault an end was."""
