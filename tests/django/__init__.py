"""A real Django project, made by `django-admin startproject` and the README. Django's settings are configured once a
process: everything of Django runs in processes of its own."""
