//! Where the emulation keeps its tables: in its own memory, but without a copy of all of them after
//! each call.
//!
//! The emulation takes a snapshot after every call for listeners that nobody here registers, at the
//! price of about a microsecond for each row there is. It asks its storage for that; this storage
//! hands everything on but that.

use std::{future::Future, pin::Pin};

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

/// The storage.
#[derive(Default)]
pub(super) struct Storage {
    memory: InMemoryDynamoDbBackend,
}

impl Storage {
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

    hand_on! {
        fn create_table(
            account_id: String, region: String, name: String, key_schema: Vec<KeySchemaElement>,
            attribute_definitions: Vec<AttributeDefinition>, billing_mode: Option<String>,
            provisioned_throughput: Option<ProvisionedThroughput>, stream_enabled: bool,
            stream_view_type: Option<String>, global_secondary_indexes: Vec<GlobalSecondaryIndexDef>,
            local_secondary_indexes: Vec<LocalSecondaryIndexDef>,
        ) -> Result<Table, DynamoDbError>;
        fn delete_table(account_id: String, region: String, name: String) -> Result<Table, DynamoDbError>;
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
        fn put_item(
            account_id: String, region: String, table_name: String, item: Item,
        ) -> Result<Option<Item>, DynamoDbError>;
        fn get_item(
            account_id: String, region: String, table_name: String, key: Item,
        ) -> Result<Option<Item>, DynamoDbError>;
        fn delete_item(
            account_id: String, region: String, table_name: String, key: Item,
        ) -> Result<Option<Item>, DynamoDbError>;
        fn update_item(
            account_id: String, region: String, table_name: String, key: Item, actions: Vec<UpdateAction>,
        ) -> Result<Option<Item>, DynamoDbError>;
        fn batch_get_item(
            account_id: String, region: String, table_name: String, keys: Vec<Item>,
        ) -> Result<Vec<Item>, DynamoDbError>;
        fn batch_write_item(
            account_id: String, region: String, table_name: String, puts: Vec<Item>, deletes: Vec<Item>,
        ) -> Result<(), DynamoDbError>;
        fn query(
            account_id: String, region: String, table_name: String, key_conditions: Item,
            sort_key_condition: Option<SortKeyCondition>, limit: Option<usize>, scan_index_forward: bool,
            exclusive_start_key: Option<Item>, index_name: Option<String>,
        ) -> Result<QueryResult, DynamoDbError>;
        fn scan(
            account_id: String, region: String, table_name: String, limit: Option<usize>,
            exclusive_start_key: Option<Item>,
        ) -> Result<QueryResult, DynamoDbError>;
        fn transact_get_items(
            account_id: String, region: String, keys: Vec<(String, Item)>,
        ) -> Result<Vec<Option<Item>>, DynamoDbError>;
        fn transact_write_items(
            account_id: String, region: String, ops: Vec<TransactOp>,
        ) -> Result<(), DynamoDbError>;
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
        fn restore(account_id: String, region: String, view: DynamodbStateView) -> Result<(), StateViewError>;
        fn merge(account_id: String, region: String, view: DynamodbStateView) -> Result<(), StateViewError>;
        fn describe_contributor_insights(
            account_id: String, region: String, table_name: String, index_name: Option<String>,
        ) -> Result<Option<ContributorInsightsConfig>, DynamoDbError>;
    }
}
