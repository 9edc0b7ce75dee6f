//! Where the emulation keeps its tables: in its own memory, but without what costs more the more rows there are.
//!
//! The emulation takes a snapshot after every call for listeners that nobody here registers, and sorts a whole partition for
//! each query. It asks its storage for both; this storage hands everything on but that.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use winterbaume_core::StateViewError;
use winterbaume_dynamodb::{
    DynamoDbBackend, DynamoDbError, DynamodbStateView, InMemoryDynamoDbBackend, QueryResult,
    StreamChangeRecord,
    types::{
        AttributeDefinition, Backup, ContinuousBackupsConfig, ContributorInsightsConfig, DynamoDbTag,
        ExportInfo, GlobalSecondaryIndexDef, GlobalTableInfo, ImportInfo, Item, KeySchemaElement,
        KinesisStreamingDestination, LocalSecondaryIndexDef, ProvisionedThroughput, ResourcePolicy,
        SortKeyCondition, StreamSummary, Table, TransactOp, TtlConfig, UpdateAction,
    },
};

use super::order::{Order, Wanted};

/// The storage. Nothing is written while something else is: what is noted about a table's order is noted in the order of
/// the writes.
#[derive(Default)]
pub(super) struct Storage {
    memory: Arc<InMemoryDynamoDbBackend>,
    order: Arc<Mutex<Order>>,
}

type Later<T> = Pin<Box<dyn Future<Output = T> + Send>>;

fn lock(order: &Mutex<Order>) -> MutexGuard<'_, Order> {
    order.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Storage {
    /// Has a write be noted once it is done.
    fn noting<T: Send + 'static>(
        &self,
        write: Later<Result<T, DynamoDbError>>,
        note: impl FnOnce(&mut Order) + Send + 'static,
    ) -> Later<Result<T, DynamoDbError>> {
        let order = Arc::clone(&self.order);
        Box::pin(async move {
            let written = write.await;
            if written.is_ok() {
                note(&mut lock(&order));
            }
            written
        })
    }

    /// Has all tables be noted anew once others have been taken over.
    fn reordering(
        &self,
        (account_id, region): (String, String),
        taken: Later<Result<(), StateViewError>>,
    ) -> Later<Result<(), StateViewError>> {
        let (memory, order) = (Arc::clone(&self.memory), Arc::clone(&self.order));
        Box::pin(async move {
            taken.await?;
            let view = memory.snapshot(account_id, region).await;
            let mut order = lock(&order);
            *order = Order::default();
            for (name, table) in &view.tables {
                let parts = [("HASH", Some(&table.hash_key_attr)), ("RANGE", table.range_key_attr.as_ref())];
                let parts = parts.into_iter().filter_map(|(kind, name)| {
                    Some(KeySchemaElement { attribute_name: name?.clone(), key_type: kind.to_owned() })
                });
                order.create(name, &parts.collect::<Vec<_>>());
                for row in table.items.values().flat_map(|rows| rows.values()) {
                    order.insert(name, row);
                }
            }
            Ok(())
        })
    }

    /// A copy of all tables.
    pub(super) async fn copy(&self, account: &str, region: &str) -> DynamodbStateView {
        self.memory.snapshot(account.to_owned(), region.to_owned()).await
    }
}

macro_rules! hand_on {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $output:ty;)*) => {
        $(fn $name(&self, $($argument: $type),*) -> Pin<Box<dyn Future<Output = $output> + Send>> {
            self.memory.$name($($argument),*)
        })*
    };
}

impl DynamoDbBackend for Storage {
    fn snapshot(
        &self,
        _account_id: String,
        _region: String,
    ) -> Pin<Box<dyn Future<Output = DynamodbStateView> + Send>> {
        Box::pin(std::future::ready(DynamodbStateView::default()))
    }

    fn scopes_with_state(&self) -> Vec<(String, String)> {
        self.memory.scopes_with_state()
    }

    fn create_table(
        &self,
        account_id: String,
        region: String,
        name: String,
        key_schema: Vec<KeySchemaElement>,
        attribute_definitions: Vec<AttributeDefinition>,
        billing_mode: Option<String>,
        provisioned_throughput: Option<ProvisionedThroughput>,
        stream_enabled: bool,
        stream_view_type: Option<String>,
        global_secondary_indexes: Vec<GlobalSecondaryIndexDef>,
        local_secondary_indexes: Vec<LocalSecondaryIndexDef>,
    ) -> Later<Result<Table, DynamoDbError>> {
        let (table, schema) = (name.clone(), key_schema.clone());
        let created = self.memory.create_table(
            account_id,
            region,
            name,
            key_schema,
            attribute_definitions,
            billing_mode,
            provisioned_throughput,
            stream_enabled,
            stream_view_type,
            global_secondary_indexes,
            local_secondary_indexes,
        );
        self.noting(created, move |order| order.create(&table, &schema))
    }

    fn delete_table(
        &self,
        account_id: String,
        region: String,
        name: String,
    ) -> Later<Result<Table, DynamoDbError>> {
        let table = name.clone();
        self.noting(self.memory.delete_table(account_id, region, name), move |order| order.drop_table(&table))
    }

    fn put_item(
        &self,
        account_id: String,
        region: String,
        table_name: String,
        item: Item,
    ) -> Later<Result<Option<Item>, DynamoDbError>> {
        let (table, row) = (table_name.clone(), lock(&self.order).key_of(&table_name, &item));
        let put = self.memory.put_item(account_id, region, table_name, item);
        self.noting(put, move |order| order.insert(&table, &row))
    }

    fn delete_item(
        &self,
        account_id: String,
        region: String,
        table_name: String,
        key: Item,
    ) -> Later<Result<Option<Item>, DynamoDbError>> {
        let (table, row) = (table_name.clone(), key.clone());
        let deleted = self.memory.delete_item(account_id, region, table_name, key);
        self.noting(deleted, move |order| order.remove(&table, &row))
    }

    fn update_item(
        &self,
        account_id: String,
        region: String,
        table_name: String,
        key: Item,
        actions: Vec<UpdateAction>,
    ) -> Later<Result<Option<Item>, DynamoDbError>> {
        let (table, row) = (table_name.clone(), key.clone());
        let updated = self.memory.update_item(account_id, region, table_name, key, actions);
        self.noting(updated, move |order| order.insert(&table, &row))
    }

    fn batch_write_item(
        &self,
        account_id: String,
        region: String,
        table_name: String,
        puts: Vec<Item>,
        deletes: Vec<Item>,
    ) -> Later<Result<(), DynamoDbError>> {
        let order = lock(&self.order);
        let keys = |rows: &[Item]| rows.iter().map(|row| order.key_of(&table_name, row)).collect::<Vec<_>>();
        let (table, rows, gone) = (table_name.clone(), keys(&puts), keys(&deletes));
        drop(order);
        let written = self.memory.batch_write_item(account_id, region, table_name, puts, deletes);
        self.noting(written, move |order| {
            rows.iter().for_each(|row| order.insert(&table, row));
            gone.iter().for_each(|row| order.remove(&table, row));
        })
    }

    fn transact_write_items(
        &self,
        account_id: String,
        region: String,
        ops: Vec<TransactOp>,
    ) -> Later<Result<(), DynamoDbError>> {
        let order = lock(&self.order);
        let noted = ops.iter().map(|op| {
            let table = op.table_name();
            (table.to_owned(), order.key_of(table, op.target()), matches!(op, TransactOp::Delete { .. }))
        });
        let noted: Vec<_> = noted.collect();
        drop(order);
        self.noting(self.memory.transact_write_items(account_id, region, ops), move |order| {
            for (table, row, is_gone) in &noted {
                if *is_gone {
                    order.remove(table, row);
                } else {
                    order.insert(table, row);
                }
            }
        })
    }

    fn query(
        &self,
        account_id: String,
        region: String,
        table_name: String,
        key_conditions: Item,
        sort_key_condition: Option<SortKeyCondition>,
        limit: Option<usize>,
        scan_index_forward: bool,
        exclusive_start_key: Option<Item>,
        index_name: Option<String>,
    ) -> Later<Result<QueryResult, DynamoDbError>> {
        let wanted = Wanted {
            key_conditions: &key_conditions,
            sort_key_condition: sort_key_condition.as_ref(),
            limit,
            forward: scan_index_forward,
            after: exclusive_start_key.as_ref(),
        };
        let order = lock(&self.order);
        let found = order.find(&table_name, &wanted).filter(|_| index_name.is_none());
        let Some(found) = found else {
            return self.memory.query(
                account_id,
                region,
                table_name,
                key_conditions,
                sort_key_condition,
                limit,
                scan_index_forward,
                exclusive_start_key,
                index_name,
            );
        };
        let keys: Vec<Item> = found.keys.into_iter().filter_map(|key| order.key(&table_name, key)).collect();
        let last_evaluated_key = keys.last().filter(|_| found.is_truncated).cloned();
        let rows = self.memory.batch_get_item(account_id, region, table_name, keys);
        Box::pin(async move {
            // One that has gone since is left out.
            let items = rows.await?;
            let count = items.len();
            Ok(QueryResult { items, count, scanned_count: count, last_evaluated_key })
        })
    }

    fn restore(
        &self,
        account_id: String,
        region: String,
        view: DynamodbStateView,
    ) -> Later<Result<(), StateViewError>> {
        let taken = self.memory.restore(account_id.clone(), region.clone(), view);
        self.reordering((account_id, region), taken)
    }

    fn merge(
        &self,
        account_id: String,
        region: String,
        view: DynamodbStateView,
    ) -> Later<Result<(), StateViewError>> {
        let taken = self.memory.merge(account_id.clone(), region.clone(), view);
        self.reordering((account_id, region), taken)
    }

    hand_on! {
        fn describe_table(account_id: String, region: String, name: String) -> Result<Table, DynamoDbError>;
        fn list_tables(account_id: String, region: String) -> Result<Vec<String>, DynamoDbError>;
        fn update_table(
            account_id: String, region: String, name: String, billing_mode: Option<String>,
            provisioned_throughput: Option<ProvisionedThroughput>,
        ) -> Result<Table, DynamoDbError>;
        fn update_stream_specification(
            account_id: String, region: String, table_name: String, stream_enabled: bool,
            stream_view_type: Option<String>,
        ) -> Result<Table, DynamoDbError>;
        fn list_streams(
            account_id: String, region: String, table_name: Option<String>,
        ) -> Result<Vec<StreamSummary>, DynamoDbError>;
        fn describe_stream_by_arn(
            account_id: String, region: String, stream_arn: String,
        ) -> Result<StreamSummary, DynamoDbError>;
        fn get_item(
            account_id: String, region: String, table_name: String, key: Item,
        ) -> Result<Option<Item>, DynamoDbError>;
        fn batch_get_item(
            account_id: String, region: String, table_name: String, keys: Vec<Item>,
        ) -> Result<Vec<Item>, DynamoDbError>;
        fn scan(
            account_id: String, region: String, table_name: String, limit: Option<usize>,
            exclusive_start_key: Option<Item>,
        ) -> Result<QueryResult, DynamoDbError>;
        fn transact_get_items(
            account_id: String, region: String, keys: Vec<(String, Item)>,
        ) -> Result<Vec<Option<Item>>, DynamoDbError>;
        fn create_backup(
            account_id: String, region: String, table_name: String, backup_name: String,
        ) -> Result<Backup, DynamoDbError>;
        fn delete_backup(account_id: String, region: String, backup_arn: String) -> Result<Backup, DynamoDbError>;
        fn describe_backup(
            account_id: String, region: String, backup_arn: String,
        ) -> Result<Backup, DynamoDbError>;
        fn list_backups(
            account_id: String, region: String, table_name: Option<String>,
        ) -> Result<Vec<Backup>, DynamoDbError>;
        fn restore_table_from_backup(
            account_id: String, region: String, backup_arn: String, target_table_name: String,
        ) -> Result<Table, DynamoDbError>;
        fn restore_table_to_point_in_time(
            account_id: String, region: String, source_table_name: String, target_table_name: String,
        ) -> Result<Table, DynamoDbError>;
        fn tag_resource(
            account_id: String, region: String, resource_arn: String, tags: Vec<DynamoDbTag>,
        ) -> Result<(), DynamoDbError>;
        fn untag_resource(
            account_id: String, region: String, resource_arn: String, tag_keys: Vec<String>,
        ) -> Result<(), DynamoDbError>;
        fn list_tags_of_resource(
            account_id: String, region: String, resource_arn: String,
        ) -> Result<Vec<DynamoDbTag>, DynamoDbError>;
        fn update_time_to_live(
            account_id: String, region: String, table_name: String, attribute_name: String, enabled: bool,
        ) -> Result<TtlConfig, DynamoDbError>;
        fn describe_time_to_live(
            account_id: String, region: String, table_name: String,
        ) -> Result<Option<TtlConfig>, DynamoDbError>;
        fn update_continuous_backups(
            account_id: String, region: String, table_name: String, enabled: bool,
        ) -> Result<ContinuousBackupsConfig, DynamoDbError>;
        fn describe_continuous_backups(
            account_id: String, region: String, table_name: String,
        ) -> Result<Option<ContinuousBackupsConfig>, DynamoDbError>;
        fn put_resource_policy(
            account_id: String, region: String, resource_arn: String, policy: String,
        ) -> Result<String, DynamoDbError>;
        fn get_resource_policy(
            account_id: String, region: String, resource_arn: String,
        ) -> Result<Option<ResourcePolicy>, DynamoDbError>;
        fn delete_resource_policy(
            account_id: String, region: String, resource_arn: String,
        ) -> Result<String, DynamoDbError>;
        fn create_global_table(
            account_id: String, region: String, global_table_name: String, replication_group: Vec<String>,
        ) -> Result<GlobalTableInfo, DynamoDbError>;
        fn describe_global_table(
            account_id: String, region: String, global_table_name: String,
        ) -> Result<GlobalTableInfo, DynamoDbError>;
        fn update_global_table(
            account_id: String, region: String, global_table_name: String, replicas_to_create: Vec<String>,
            replicas_to_delete: Vec<String>,
        ) -> Result<GlobalTableInfo, DynamoDbError>;
        fn list_global_tables(account_id: String, region: String) -> Result<Vec<GlobalTableInfo>, DynamoDbError>;
        fn enable_kinesis_streaming_destination(
            account_id: String, region: String, table_name: String, stream_arn: String,
            precision: Option<String>,
        ) -> Result<KinesisStreamingDestination, DynamoDbError>;
        fn disable_kinesis_streaming_destination(
            account_id: String, region: String, table_name: String, stream_arn: String,
        ) -> Result<KinesisStreamingDestination, DynamoDbError>;
        fn describe_kinesis_streaming_destinations(
            account_id: String, region: String, table_name: String,
        ) -> Result<Vec<KinesisStreamingDestination>, DynamoDbError>;
        fn update_kinesis_streaming_destination(
            account_id: String, region: String, table_name: String, stream_arn: String,
            precision: Option<String>,
        ) -> Result<KinesisStreamingDestination, DynamoDbError>;
        fn update_contributor_insights(
            account_id: String, region: String, table_name: String, index_name: Option<String>, mode: String,
        ) -> Result<ContributorInsightsConfig, DynamoDbError>;
        fn list_contributor_insights(
            account_id: String, region: String, table_name: Option<String>,
        ) -> Result<Vec<ContributorInsightsConfig>, DynamoDbError>;
        fn export_table_to_point_in_time(
            account_id: String, region: String, table_arn: String, s3_bucket: Option<String>,
            s3_prefix: Option<String>, export_format: Option<String>,
        ) -> Result<ExportInfo, DynamoDbError>;
        fn describe_export(
            account_id: String, region: String, export_arn: String,
        ) -> Result<ExportInfo, DynamoDbError>;
        fn list_exports(account_id: String, region: String) -> Vec<ExportInfo>;
        fn import_table(
            account_id: String, region: String, table_name: String, s3_bucket_source: Option<String>,
            input_format: Option<String>,
        ) -> ImportInfo;
        fn describe_import(
            account_id: String, region: String, import_arn: String,
        ) -> Result<ImportInfo, DynamoDbError>;
        fn list_imports(account_id: String, region: String) -> Vec<ImportInfo>;
        fn get_stream_records(
            account_id: String, region: String, stream_arn: String, next_sequence_number: u64,
            limit: Option<usize>,
        ) -> Result<(Vec<StreamChangeRecord>, u64), DynamoDbError>;
        fn describe_contributor_insights(
            account_id: String, region: String, table_name: String, index_name: Option<String>,
        ) -> Result<Option<ContributorInsightsConfig>, DynamoDbError>;
    }
}
