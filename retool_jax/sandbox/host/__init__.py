"""The caller's side of the sandbox: queue, workers, retries, sessions, and the judgement whose fault a failure was."""
