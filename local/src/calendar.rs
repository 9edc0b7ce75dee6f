//! Points in time as AWS writes them into events.

use proto::calendar::date;

/// A time as access logs have it: `12/Mar/2020:19:03:58 +0000`.
#[must_use]
pub fn common_log_time(epoch_secs: u64) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (year, month, day) = date(epoch_secs / 86_400);
    let secs = epoch_secs % 86_400;
    let name = usize::try_from(month - 1).ok().and_then(|month| MONTHS.get(month)).unwrap_or(&"Jan");
    format!("{day:02}/{name}/{year}:{:02}:{:02}:{:02} +0000", secs / 3600, secs / 60 % 60, secs % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        assert_eq!(common_log_time(0), "01/Jan/1970:00:00:00 +0000");
        assert_eq!(common_log_time(1_583_348_638), "04/Mar/2020:19:03:58 +0000");
        assert_eq!(common_log_time(1_582_934_400), "29/Feb/2020:00:00:00 +0000");
        assert_eq!(common_log_time(4_102_444_799), "31/Dec/2099:23:59:59 +0000");
    }
}
