"""The study that decides the default recipe: docs/study.md has its question and its rule."""
