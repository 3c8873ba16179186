"""What strategies are made of: importances, exemplars, teachers, gradients by sample. No strategy lives here."""
