"""Fields that read what our tables hold."""

from __future__ import annotations

from typing import Any

from django.db import models


class IdentifierField(models.UUIDField):
    """A UUID: native on PostgreSQL, its usual 36 characters on SQLite, where Django writes 32."""

    def db_type(self, connection: Any) -> Any:
        return super().db_type(connection) if connection.features.has_native_uuid_field else "varchar(36)"

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        if value is None or connection.features.has_native_uuid_field:
            return super().get_db_prep_value(value, connection, prepared)
        return str(self.to_python(value))
