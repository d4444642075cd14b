"""The project as somebody meets it who has only installed the package: ``make newcomer`` runs ``run.py``."""
