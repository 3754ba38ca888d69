"""Templates of workplace_assistant tasks, one module for each domain. Their import registers them."""

from gymexp.data.workplace.tasks import analytics, calendar, customers, email, projects, several
from gymexp.data.workplace.tasks.draft import TEMPLATES, Draft

__all__ = ["TEMPLATES", "Draft", "analytics", "calendar", "customers", "email", "projects", "several"]
