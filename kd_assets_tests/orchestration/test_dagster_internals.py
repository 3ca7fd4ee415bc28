"""What we rely on in Dagster without its promise. A failure here after an upgrade says which piece to look at."""

from collections.abc import Iterator

import dagster as dg

from kd_assets.orchestration.dagster_internals import already_recorded


def run_of(with_output: bool) -> tuple[dg.ExecuteInProcessResult, list[str]]:
    """A run of an asset that logs its own materialization, and of one downstream of it; and who ran."""
    ran: list[str] = []

    @dg.multi_asset(specs=[dg.AssetSpec("upstream", skippable=True)])
    def upstream(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        ran.append("upstream")
        context.log_event(dg.AssetMaterialization("upstream", metadata={"mine": 1}))
        if with_output:
            yield already_recorded(dg.AssetKey("upstream"))

    @dg.asset(deps=["upstream"])
    def downstream() -> None:
        ran.append("downstream")

    return dg.materialize([upstream, downstream]), ran


def recorded(result: dg.ExecuteInProcessResult) -> list[dg.AssetMaterialization]:
    return [
        e.step_materialization_data.materialization
        for e in result.get_asset_materialization_events()
        if e.asset_key == dg.AssetKey("upstream")
    ]


def test_already_recorded_lets_downstream_run_and_records_nothing_more() -> None:
    result, ran = run_of(with_output=True)
    assert ran == ["upstream", "downstream"]
    (only,) = recorded(result)
    assert only.metadata["mine"].value == 1


def test_without_it_dagster_skips_downstream_silently_and_calls_the_run_a_success() -> None:
    result, ran = run_of(with_output=False)
    assert ran == ["upstream"]
    assert result.success, "should Dagster fail such a run one day, already_recorded may go"
