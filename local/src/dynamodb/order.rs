//! The sort keys of every partition in their order. The emulation keeps rows in no order and sorts a whole partition for
//! each query; where ten thousand deliveries wait, that was most of what each of them cost. Pure.

use std::{
    collections::{BTreeSet, HashMap},
    ops::Bound,
};

use winterbaume_dynamodb::types::{AttributeValue, Item, KeySchemaElement, SortKeyCondition};

/// The keys of all tables that have a partition key and a sort key.
#[derive(Debug, Default)]
pub(super) struct Order {
    tables: HashMap<String, Keys>,
}

/// The keys of one table.
#[derive(Debug)]
struct Keys {
    partition_key: String,
    sort_key: String,
    partitions: HashMap<String, BTreeSet<String>>,
    /// Whether a row has come whose key is not of two strings, so that nothing is known about the order.
    is_mixed: bool,
}

/// What a query asks for.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    /// Values that key attributes must have.
    pub(super) key_conditions: &'a Item,
    /// What the sort key must be like.
    pub(super) sort_key_condition: Option<&'a SortKeyCondition>,
    /// How many rows at most.
    pub(super) limit: Option<usize>,
    /// Whether the smallest comes first.
    pub(super) forward: bool,
    /// The row after which it begins.
    pub(super) after: Option<&'a Item>,
}

/// What a query finds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The keys of the rows, in the order that was asked for.
    pub(super) keys: Vec<(String, String)>,
    /// Whether there are more.
    pub(super) is_truncated: bool,
}

impl Order {
    /// Notes a new table.
    pub(super) fn create(&mut self, table: &str, key_schema: &[KeySchemaElement]) {
        let name = |kind: &str| {
            let part = key_schema.iter().find(|part| part.key_type == kind);
            part.map(|part| part.attribute_name.clone())
        };
        if let (Some(partition_key), Some(sort_key)) = (name("HASH"), name("RANGE")) {
            let keys = Keys { partition_key, sort_key, partitions: HashMap::new(), is_mixed: false };
            self.tables.insert(table.to_owned(), keys);
        }
    }

    /// Forgets a table.
    pub(super) fn drop_table(&mut self, table: &str) {
        self.tables.remove(table);
    }

    /// Of a row what its key is; nothing of one of a table that is not known here.
    pub(super) fn key_of(&self, table: &str, row: &Item) -> Item {
        let keys = self.tables.get(table);
        let names = keys.into_iter().flat_map(|keys| [&keys.partition_key, &keys.sort_key]);
        names.filter_map(|name| Some((name.clone(), row.get(name)?.clone()))).collect()
    }

    /// Notes that a row with this key is there.
    pub(super) fn insert(&mut self, table: &str, row: &Item) {
        let Some(keys) = self.tables.get_mut(table) else { return };
        match keys.of(row) {
            Some((partition, sort)) => {
                // The name of a partition is copied for its first row only.
                match keys.partitions.get_mut(partition) {
                    Some(rows) => drop(rows.insert(sort.to_owned())),
                    None => {
                        drop(keys.partitions.insert(partition.to_owned(), BTreeSet::from([sort.to_owned()])));
                    }
                }
            }
            None => keys.is_mixed = true,
        }
    }

    /// Notes that the row with this key has gone.
    pub(super) fn remove(&mut self, table: &str, row: &Item) {
        let Some(keys) = self.tables.get_mut(table) else { return };
        let Some((partition, sort)) = keys.of(row) else { return };
        let Some(rows) = keys.partitions.get_mut(partition) else { return };
        rows.remove(sort);
        if rows.is_empty() {
            let partition = partition.to_owned();
            keys.partitions.remove(&partition);
        }
    }

    /// The keys that a query finds; nothing where their order is not known here.
    pub(super) fn find(&self, table: &str, wanted: &Wanted<'_>) -> Option<Found> {
        let keys = self.tables.get(table).filter(|keys| !keys.is_mixed)?;
        let partition = string(wanted.key_conditions.get(&keys.partition_key)?)?;
        let (lowest, highest) = match (wanted.key_conditions.get(&keys.sort_key), wanted.sort_key_condition) {
            (Some(value), None) => (Bound::Included(string(value)?), Bound::Included(string(value)?)),
            (None, Some(condition)) => bounds(condition)?,
            (None, None) => (Bound::Unbounded, Bound::Unbounded),
            (Some(_), Some(_)) => return None,
        };
        let prefix = match wanted.sort_key_condition {
            Some(SortKeyCondition::BeginsWith(prefix)) => string(prefix)?,
            _ => "",
        };
        let after = match wanted.after {
            Some(row) => Some(string(row.get(&keys.sort_key)?)?),
            None => None,
        };
        let (lowest, highest) = match after {
            Some(after) if wanted.forward => (later(lowest, after), highest),
            Some(after) => (lowest, earlier(highest, after)),
            None => (lowest, highest),
        };
        let rows = keys.partitions.get(partition);
        let rows = rows.filter(|_| !is_empty(lowest, highest));
        let rows = rows.into_iter().flat_map(|rows| rows.range::<str, _>((lowest, highest)));
        let most = wanted.limit.unwrap_or(usize::MAX);
        // One more shows whether there are more.
        let take = most.saturating_add(1);
        let has_prefix = |row: &&String| row.starts_with(prefix);
        let mut found: Vec<_> = if wanted.forward {
            rows.take_while(has_prefix).take(take).collect()
        } else {
            rows.rev().skip_while(|row| !has_prefix(row)).take_while(has_prefix).take(take).collect()
        };
        let is_truncated = found.len() > most;
        found.truncate(most);
        let keys = found.into_iter().map(|sort| (partition.to_owned(), sort.clone())).collect();
        Some(Found { keys, is_truncated })
    }

    /// The row that has these keys and nothing else; nothing for a table that is not known here.
    pub(super) fn key(&self, table: &str, (partition, sort): (String, String)) -> Option<Item> {
        let keys = self.tables.get(table)?;
        Some(Item::from([
            (keys.partition_key.clone(), AttributeValue::S(partition)),
            (keys.sort_key.clone(), AttributeValue::S(sort)),
        ]))
    }
}

impl Keys {
    fn of<'a>(&self, row: &'a Item) -> Option<(&'a str, &'a str)> {
        Some((string(row.get(&self.partition_key)?)?, string(row.get(&self.sort_key)?)?))
    }
}

fn string(value: &AttributeValue) -> Option<&str> {
    match value {
        AttributeValue::S(text) => Some(text),
        _ => None,
    }
}

/// Between what a condition allows. `begins_with` begins with its prefix; where it ends is not said.
fn bounds(condition: &SortKeyCondition) -> Option<(Bound<&str>, Bound<&str>)> {
    use Bound::{Excluded, Included, Unbounded};
    Some(match condition {
        SortKeyCondition::LessThan(value) => (Unbounded, Excluded(string(value)?)),
        SortKeyCondition::LessThanOrEqual(value) => (Unbounded, Included(string(value)?)),
        SortKeyCondition::GreaterThan(value) => (Excluded(string(value)?), Unbounded),
        SortKeyCondition::GreaterThanOrEqual(value) => (Included(string(value)?), Unbounded),
        SortKeyCondition::Between(least, most) => (Included(string(least)?), Included(string(most)?)),
        SortKeyCondition::BeginsWith(prefix) => (Included(string(prefix)?), Unbounded),
    })
}

/// The lower of two ends, where one is behind a row that was seen.
fn later<'a>(lowest: Bound<&'a str>, after: &'a str) -> Bound<&'a str> {
    match lowest {
        Bound::Included(value) if value > after => lowest,
        Bound::Excluded(value) if value >= after => lowest,
        _ => Bound::Excluded(after),
    }
}

/// The upper of two ends, where one is before a row that was seen.
fn earlier<'a>(highest: Bound<&'a str>, before: &'a str) -> Bound<&'a str> {
    match highest {
        Bound::Included(value) if value < before => highest,
        Bound::Excluded(value) if value <= before => highest,
        _ => Bound::Excluded(before),
    }
}

/// Whether nothing can be between the two; a set does not take such ends.
fn is_empty(lowest: Bound<&str>, highest: Bound<&str>) -> bool {
    match (lowest, highest) {
        (Bound::Included(lowest), Bound::Included(highest)) => lowest > highest,
        (
            Bound::Included(lowest) | Bound::Excluded(lowest),
            Bound::Included(highest) | Bound::Excluded(highest),
        ) => lowest >= highest,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::btree_set, option, prelude::*};
    use winterbaume_dynamodb::{DynamoDbBackend, InMemoryDynamoDbBackend, types::AttributeDefinition};

    use super::*;

    fn text(value: &str) -> AttributeValue {
        AttributeValue::S(value.to_owned())
    }

    fn row(partition: &str, sort: &str) -> Item {
        Item::from([("pk".to_owned(), text(partition)), ("sk".to_owned(), text(sort))])
    }

    fn schema() -> Vec<KeySchemaElement> {
        [("pk", "HASH"), ("sk", "RANGE")]
            .map(|(name, kind)| KeySchemaElement { attribute_name: name.into(), key_type: kind.into() })
            .to_vec()
    }

    fn condition() -> impl Strategy<Value = SortKeyCondition> {
        let value = || "[a-c]{0,2}".prop_map(|value| text(&value));
        prop_oneof![
            value().prop_map(SortKeyCondition::LessThan),
            value().prop_map(SortKeyCondition::LessThanOrEqual),
            value().prop_map(SortKeyCondition::GreaterThan),
            value().prop_map(SortKeyCondition::GreaterThanOrEqual),
            (value(), value()).prop_map(|(least, most)| SortKeyCondition::Between(least, most)),
            value().prop_map(SortKeyCondition::BeginsWith),
        ]
    }

    proptest! {
        /// The emulation itself is the judge.
        #[test]
        fn finds_what_the_emulation_finds_by_sorting(
            rows in btree_set("[a-c]{1,3}", 0..20),
            gone in btree_set("[a-c]{1,3}", 0..5),
            equal in option::of("[a-c]{1,2}"),
            condition in option::of(condition()),
            limit in option::of(1_usize..6),
            forward: bool,
            after in option::of("[a-c]{1,3}"),
        ) {
            let condition = condition.filter(|_| equal.is_none());
            let mut order = Order::default();
            order.create("t", &schema());
            let emulation = InMemoryDynamoDbBackend::new();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (account, region) = (String::from("1"), String::from("r"));
            let theirs = runtime.block_on(async {
                let types = ["pk", "sk"].map(|name| AttributeDefinition {
                    attribute_name: name.into(), attribute_type: "S".into(),
                });
                emulation.create_table(
                    account.clone(), region.clone(), "t".into(), schema(), types.to_vec(), None, None, false, None,
                    Vec::new(), Vec::new(),
                ).await.unwrap();
                for sort in rows.iter().chain(["other"].map(String::from).iter()) {
                    let row = row(if sort == "other" { "q" } else { "p" }, sort);
                    order.insert("t", &row);
                    emulation.put_item(account.clone(), region.clone(), "t".into(), row).await.unwrap();
                }
                for sort in &gone {
                    order.remove("t", &row("p", sort));
                    emulation.delete_item(account.clone(), region.clone(), "t".into(), row("p", sort)).await.unwrap();
                }
                let mut conditions = Item::from([("pk".to_owned(), text("p"))]);
                conditions.extend(equal.as_deref().map(|value| ("sk".to_owned(), text(value))));
                let after = after.as_deref().map(|sort| row("p", sort));
                let ours = order.find("t", &Wanted {
                    key_conditions: &conditions, sort_key_condition: condition.as_ref(), limit, forward,
                    after: after.as_ref(),
                }).unwrap();
                let theirs = emulation.query(
                    account, region, "t".into(), conditions, condition, limit, forward, after, None,
                ).await.unwrap();
                let sort_keys = theirs.items.iter().map(|row| ("p".to_owned(), string(&row["sk"]).unwrap().to_owned()));
                (ours, Found { keys: sort_keys.collect(), is_truncated: theirs.last_evaluated_key.is_some() })
            });
            prop_assert_eq!(theirs.0, theirs.1);
        }
    }

    #[test]
    fn says_nothing_about_keys_that_are_no_strings() {
        let mut order = Order::default();
        order.create("t", &schema());
        let conditions = Item::from([("pk".to_owned(), text("p"))]);
        let wanted = || Wanted {
            key_conditions: &conditions,
            sort_key_condition: None,
            limit: None,
            forward: true,
            after: None,
        };
        assert_eq!(order.find("t", &wanted()), Some(Found { keys: Vec::new(), is_truncated: false }));
        assert_eq!(order.find("other", &wanted()), None);
        let number =
            Item::from([("pk".to_owned(), text("p")), ("sk".to_owned(), AttributeValue::N("1".into()))]);
        order.insert("t", &number);
        assert_eq!(order.find("t", &wanted()), None);
    }
}
