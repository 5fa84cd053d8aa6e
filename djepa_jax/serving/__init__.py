"""Pages for people: one to play with a trained model, and one to give away."""
