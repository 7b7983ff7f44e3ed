
    CREATE TABLE snapshot (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, name TEXT, owner TEXT NOT NULL,
        sandbox_id TEXT, created_at TEXT NOT NULL, template TEXT NOT NULL, image_digest TEXT NOT NULL, parent TEXT,
        kernel_state TEXT, execution_count INTEGER, layers INTEGER NOT NULL, added_bytes INTEGER NOT NULL,
        flattened_from TEXT
    ) STRICT;
    CREATE INDEX snapshot_by_sandbox ON snapshot (sandbox_id, created_at);
    CREATE INDEX snapshot_by_origin ON snapshot (flattened_from);
    CREATE TABLE part (
        number INTEGER PRIMARY KEY, kind TEXT NOT NULL, digest TEXT NOT NULL, stored_bytes INTEGER NOT NULL,
        inode INTEGER, size_bytes INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, UNIQUE (kind, digest)
    ) STRICT;
    CREATE TABLE snapshot_part (
        snapshot INTEGER NOT NULL REFERENCES snapshot ON DELETE CASCADE, part INTEGER NOT NULL REFERENCES part,
        PRIMARY KEY (snapshot, part)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX snapshot_by_part ON snapshot_part (part);
    CREATE TABLE pinned_snapshot (
        user TEXT NOT NULL, id TEXT NOT NULL, PRIMARY KEY (user, id)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX user_by_snapshot ON pinned_snapshot (id);
    CREATE TABLE pinned_part (
        user TEXT NOT NULL, part INTEGER NOT NULL REFERENCES part, PRIMARY KEY (user, part)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX user_by_part ON pinned_part (part);
    PRAGMA user_version = 3;
