"""The coordinator: a teacher, an ensemble of students' opinions, and no private record."""
