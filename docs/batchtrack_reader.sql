-- A role that may read celery-batchtrack's views, and nothing else. PostgreSQL.
-- After `batchtrack migrate`, as the owner of the views; may be run again. Where the views are in another schema,
-- set search_path to it first.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'batchtrack_reader') THEN
        CREATE ROLE batchtrack_reader NOLOGIN;
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO batchtrack_reader', current_schema());
END
$$;

DO $$
DECLARE
    found record;
BEGIN
    FOR found IN
        SELECT viewname FROM pg_views
        WHERE schemaname = current_schema() AND viewname LIKE 'batchtrack\_%'
    LOOP
        EXECUTE format('GRANT SELECT ON %I TO batchtrack_reader', found.viewname);
    END LOOP;
END
$$;
