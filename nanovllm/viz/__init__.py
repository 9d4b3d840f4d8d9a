"""Pictures of a running engine: as characters, as a figure, and live."""
