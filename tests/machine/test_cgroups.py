"""The limits of control groups, in versions 1 and 2 of the kernel's interface, made of files."""

from __future__ import annotations

from drawplate.machine import cgroups


def test_control_group_limits_count_at_every_level(monkeypatch, tmp_path):
    inner = tmp_path / "slice" / "job"
    inner.mkdir(parents=True)
    (tmp_path / "slice" / "memory.max").write_text("2000000000\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("50000 100000\n")
    groups = tmp_path / "proc-cgroup"
    groups.write_text("0::/slice/job\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OF_THIS_PROCESS", groups)
    assert cgroups.usable_ram_bytes() == 2_000_000_000
    assert cgroups.usable_cores() == 1


def test_the_older_kind_of_control_groups_is_read_too(monkeypatch, tmp_path):
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text("1000000000\n")
    groups = tmp_path / "proc-cgroup"
    groups.write_text("4:memory:/job\n1:cpu,cpuacct:/\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OF_THIS_PROCESS", groups)
    assert cgroups.usable_ram_bytes() == 1_000_000_000


def test_what_is_available_counts_control_groups_and_not_their_page_cache(monkeypatch, tmp_path):
    job = tmp_path / "slice" / "job"
    job.mkdir(parents=True)
    for name, text in {"max": "max", "current": "900000", "stat": "anon 1"}.items():
        (job / f"memory.{name}").write_text(text)
    for name, text in {
        "max": "1000000",
        "current": "900000",
        "stat": "inactive_file 200000\nactive_file 50000",
    }.items():
        (job.parent / f"memory.{name}").write_text(text)
    groups = tmp_path / "proc-cgroup"
    groups.write_text("0::/slice/job\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OF_THIS_PROCESS", groups)
    assert cgroups.available_ram_bytes() == 350_000
    groups.unlink()
    assert cgroups.available_ram_bytes() > 1_000_000


def test_what_is_available_in_the_older_kind_of_control_groups(monkeypatch, tmp_path):
    (tmp_path / "memory" / "job").mkdir(parents=True)
    usage = {
        "limit_in_bytes": "1000000",
        "usage_in_bytes": "950000",
        "stat": "inactive_file 1\ntotal_inactive_file 20000",
    }
    for name, text in usage.items():
        (tmp_path / "memory" / "job" / f"memory.{name}").write_text(text)
    groups = tmp_path / "proc-cgroup"
    groups.write_text("4:memory:/job\n")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OF_THIS_PROCESS", groups)
    assert cgroups.available_ram_bytes() == 70_000
