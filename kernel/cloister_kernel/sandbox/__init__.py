"""What keeps a notebook kernel in: namespaces, uid, cgroup, system-call filter, Landlock, and a view of its own."""
