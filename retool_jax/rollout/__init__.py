"""Problems to trajectories: sampling with tools, records, and rewards."""
