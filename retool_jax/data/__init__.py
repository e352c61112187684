"""Problems, demonstrations and packed batches."""
