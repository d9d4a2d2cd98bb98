//! Points in time and how long things took, in the words of whoever reads them.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// `at_ms`, in milliseconds since 1970, by this machine's clock and zone: the time of day alone when that is today.
pub(crate) fn when(at_ms: u64) -> String {
    when_in(&TimeZone::system(), at_ms, Timestamp::now())
}

/// `at_ms`, in milliseconds since 1970, to the second and in UTC.
pub(crate) fn date(at_ms: u64) -> String {
    timestamp(at_ms).map_or("-".to_owned(), |at| at.strftime("%Y-%m-%d %H:%M:%SZ").to_string())
}

/// How long ago `at_ms` was, in milliseconds since 1970; nothing when it is still to come.
pub(crate) fn since(at_ms: u64) -> Duration {
    let now = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0);
    Duration::from_millis(now.saturating_sub(at_ms))
}

/// A duration in the one or two units that matter.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0 => format!("{} ms", duration.as_millis()),
        1..10 => format!("{:.1} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// None for 0, which says that it is not known, and for what no clock can say.
fn timestamp(at_ms: u64) -> Option<Timestamp> {
    let at = i64::try_from(at_ms).ok().filter(|at| *at > 0)?;
    Timestamp::from_millisecond(at).ok()
}

fn when_in(zone: &TimeZone, at_ms: u64, now: Timestamp) -> String {
    let Some(at) = timestamp(at_ms) else {
        return "-".to_owned();
    };
    let at = at.to_zoned_datetime(zone.clone());
    let today = at.date() == now.to_zoned_datetime(zone.clone()).date();
    at.strftime(if today { "%H:%M:%S" } else { "%Y-%m-%d %H:%M:%S" }).to_string()
}

#[cfg(test)]
mod tests {
    use jiff::tz::Offset;

    use super::*;

    /// 2026-11-25 01:40:12 UTC.
    const AT: u64 = 1_795_570_812_000;

    #[test]
    fn today_is_a_time_of_day_and_older_is_a_date_in_the_readers_zone() {
        let now = Timestamp::from_millisecond(AT.cast_signed() + 3_600_000).unwrap();
        let west = TimeZone::fixed(Offset::from_hours(-2).unwrap());
        assert_eq!(when_in(&TimeZone::UTC, AT, now), "01:40:12");
        assert_eq!(when_in(&west, AT, now), "2026-11-24 23:40:12");
        assert_eq!(when_in(&west, AT - 86_400_000, now), "2026-11-23 23:40:12");
        assert_eq!(when_in(&TimeZone::UTC, 0, now), "-");
        assert_eq!(date(AT), "2026-11-25 01:40:12Z");
        assert_eq!(date(u64::MAX), "-");
    }

    #[test]
    fn durations_are_written_in_the_units_that_matter() {
        let cases =
            [(340, "340 ms"), (9_900, "9.9 s"), (59_000, "59 s"), (200_000, "3 min 20 s"), (7_500_000, "2 h 5 min")];
        for (ms, text) in cases {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
        assert_eq!(since(u64::MAX), Duration::ZERO);
    }
}
