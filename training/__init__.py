"""What trains and evaluates the bundled model."""
